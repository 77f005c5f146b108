//! What macOS says of its disks, volumes and snapshots, and what it does to them when told, all by its
//! own tools: diskutil(8), tmutil(8), mount_apfs(8), hdiutil(1), asr(8), ioreg(8), csrutil(8),
//! sw_vers(1), sysctl(8), system_profiler(8).
//!
//! It is all text of tools, so it is built on every system, and tested where there is no Mac: with
//! outputs in the shape that was recorded on such (`shapes`), and with tools that only pretend.
//! Nothing of it has been run on a Mac yet.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::command::{Output, Tool};
use crate::error::{Context, Error, Result};

mod counters;
mod disk;
mod image;
mod listing;
mod machine;
mod plist;
mod restore;
mod snapshot;

pub use counters::Written;
pub use disk::{Container, Disk, Store, Volume};
pub use image::{Attached, Mode, SECTOR};
pub use listing::Whole;
pub use machine::Version;
pub use snapshot::Snapshot;

/// A tool that only asks; those of macOS wait for daemons, and for disks to spin up.
const ASKING: Duration = Duration::from_secs(120);

/// A tool that changes something.
const CHANGING: Duration = Duration::from_secs(600);

/// Most that is taken of what a tool says, in bytes.
const MOST_SAID: usize = 4 << 20;

/// A macOS: where its tools and device nodes are, and who asks.
#[derive(Clone, Debug)]
pub struct System {
    /// `None`: where the system keeps its own.
    tools: Option<PathBuf>,
    devices: PathBuf,
    is_macos: bool,
    is_root: bool,
    wait: Duration,
}

impl System {
    /// The one this program runs on, if it is one.
    pub fn this() -> Self {
        Self {
            tools: None,
            devices: PathBuf::from("/dev"),
            is_macos: cfg!(target_os = "macos"),
            is_root: nix::unistd::geteuid().is_root(),
            wait: Duration::from_secs(3),
        }
    }

    /// For tests: one whose tools are the programs in the folder `tools`, and whose device nodes are the
    /// files in the folder `devices`; without long waits.
    pub fn pretended(tools: impl Into<PathBuf>, devices: impl Into<PathBuf>) -> Self {
        Self {
            tools: Some(tools.into()),
            devices: devices.into(),
            is_macos: true,
            is_root: true,
            wait: Duration::from_millis(20),
        }
    }

    /// The same as somebody else than root sees it.
    #[must_use]
    pub fn without_root(self) -> Self {
        Self {
            is_root: false,
            ..self
        }
    }

    /// Whether this is macOS at all: else nothing else may be asked.
    pub fn is_macos(&self) -> bool {
        self.is_macos
    }

    /// Whether it is root who asks.
    pub fn is_root(&self) -> bool {
        self.is_root
    }

    /// How long to wait before something that is busy is tried again.
    pub fn wait(&self) -> Duration {
        self.wait
    }

    /// The device node `id` (`disk3s5`).
    ///
    /// # Errors
    /// If that is no name of a disk.
    pub fn node(&self, id: &str) -> Result<PathBuf> {
        Ok(self.devices.join(checked_id(id)?))
    }

    /// The device node that a name without its folder means (`disk3s5`), if there is such a one.
    pub fn named(&self, text: &str) -> Option<PathBuf> {
        let node = self.node(text).ok().filter(|_| self.is_macos)?;
        node.exists().then_some(node)
    }

    fn tool(&self, name: &str) -> Result<Tool> {
        let tool = match &self.tools {
            Some(folder) => Tool::find_in(&[folder], name),
            None => Tool::find(name),
        };
        Ok(tool?.limit(MOST_SAID))
    }

    /// What a tool says that must succeed and changes nothing.
    fn ask(&self, name: &str, args: &[&str]) -> Result<Vec<u8>> {
        let tool = self.tool(name)?.args(args).deadline(ASKING);
        Ok(tool.run()?.checked()?.stdout)
    }

    /// The same where a line of text is expected.
    fn ask_text(&self, name: &str, args: &[&str]) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.ask(name, args)?).into_owned())
    }

    /// Has a tool change something; what it says.
    fn change(&self, name: &str, tell: impl FnOnce(Tool) -> Tool) -> Result<Vec<u8>> {
        let tool = tell(self.tool(name)?).deadline(CHANGING);
        let output = tool.run().and_then(Output::checked)?;
        Ok(output.stdout)
    }
}

/// Bytes that are free where this folder is.
///
/// # Errors
/// What `statvfs(2)` says.
pub fn free_in(folder: &Path) -> Result<u64> {
    let room = nix::sys::statvfs::statvfs(folder).context("cannot examine", folder)?;
    let bytes = u128::from(room.fragment_size()) * u128::from(room.blocks_available());
    Ok(u64::try_from(bytes).unwrap_or(u64::MAX))
}

/// A disk, a slice of it, a volume or a snapshot as macOS names them: `disk3`, `disk0s2`, `disk3s5`,
/// `disk3s1s1`. Nothing else is ever handed to a tool as one.
fn checked_id(id: &str) -> Result<&str> {
    let numbers = id.strip_prefix("disk").unwrap_or_default().split('s');
    let is_number = |text: &str| {
        (1..=6).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
    };
    let numbers: Vec<_> = numbers.collect();
    match numbers.len() <= 3 && numbers.iter().all(|number| is_number(number)) {
        true => Ok(id),
        false => Err(Error::invalid("cannot understand", id, "no name of a disk")),
    }
}

/// The same of a node, `/dev/disk3`, as some tools say it.
fn id_of_node(node: &str) -> Result<String> {
    let id = node.strip_prefix("/dev/").unwrap_or(node);
    checked_id(id).map(str::to_owned)
}

/// The whole disk that a name is of or on: of `disk0s2` and of `disk0`, `disk0`.
fn whole_of(id: &str) -> Result<&str> {
    let number = checked_id(id)?["disk".len()..].find('s');
    Ok(number.map_or(id, |digits| &id[..digits + "disk".len()]))
}

/// A UUID as tools print it; nothing else is handed to a tool as one.
fn checked_uuid(uuid: &str) -> Result<&str> {
    let is_right = uuid.len() == 36
        && uuid.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        });
    match is_right {
        true => Ok(uuid),
        false => Err(Error::invalid("cannot understand", uuid, "no UUID")),
    }
}

/// A path that a tool cannot take for an option.
fn checked_path(path: &Path) -> Result<&Path> {
    match path.is_absolute() {
        true => Ok(path),
        false => Err(Error::invalid("cannot use", path, "not a whole path")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_disks_are_told_from_anything_else() {
        for good in ["disk0", "disk12", "disk0s2", "disk3s5", "disk3s1s1"] {
            assert_eq!(checked_id(good).unwrap(), good);
        }
        for bad in [
            "",
            "disk",
            "disk0s",
            "disks1",
            "disk0s1s1s1",
            "-plist",
            "/dev/disk0",
            "disk1/..",
            "disk+1",
            "disk1234567",
            "rdisk0",
            "disk0 s1",
        ] {
            assert!(checked_id(bad).is_err(), "{bad}");
        }
        assert_eq!(id_of_node("/dev/disk4s1").unwrap(), "disk4s1");
        assert!(id_of_node("/etc/passwd").is_err());
        assert_eq!(whole_of("disk14s2").unwrap(), "disk14");
        assert_eq!(whole_of("disk14").unwrap(), "disk14");
        assert_eq!(whole_of("disk3s1s1").unwrap(), "disk3");
    }

    #[test]
    fn uuids_are_told_from_anything_else() {
        assert!(checked_uuid("CA15E030-DBDD-4FF4-847D-50D5EE26B798").is_ok());
        for bad in [
            "",
            "-uuid",
            "CA15E030-DBDD-4FF4-847D-50D5EE26B79",
            "CA15E030_DBDD-4FF4-847D-50D5EE26B798",
        ] {
            assert!(checked_uuid(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_disk_can_be_named_without_its_folder() {
        let dir = crate::testing::scratch();
        std::fs::write(dir.path().join("disk3s5"), "").unwrap();
        let system = System::pretended("/nowhere", dir.path());
        assert_eq!(system.named("disk3s5"), Some(dir.path().join("disk3s5")));
        for none in ["disk3", "../disk3s5", "sda1"] {
            assert_eq!(system.named(none), None, "{none}");
        }
    }

    #[test]
    fn this_system_says_what_it_is() {
        assert_eq!(System::this().is_macos(), cfg!(target_os = "macos"));
        let pretended = System::pretended("/nowhere", "/nowhere");
        assert!(pretended.is_macos() && pretended.is_root());
        assert!(!pretended.clone().without_root().is_root());
        let error = pretended.version().unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    }
}
