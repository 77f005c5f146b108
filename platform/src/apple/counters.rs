//! What was written to each disk since the system started, as the drivers count it:
//! `ioreg -a -r -l -d 2 -c IOBlockStorageDriver`. A driver has the numbers; the disk it drives, one level
//! below, has the name.

use std::collections::BTreeMap;

use super::plist::{Dict, dicts, parse};
use super::{System, checked_id};
use crate::error::Result;

const TOOL: &str = "ioreg";

/// How often, and how much, was written to a whole disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Writes.
    pub operations: u64,
    /// Bytes.
    pub bytes: u64,
}

impl System {
    /// The counters of all disks whose driver keeps them, by name (`disk0`). A disk that the system makes up
    /// itself (of a container of APFS) has none: its writes count on what it lies on.
    ///
    /// # Errors
    /// If the tool fails.
    pub fn written(&self) -> Result<BTreeMap<String, Written>> {
        let args = [
            "-a",
            "-r",
            "-l",
            "-w",
            "0",
            "-d",
            "2",
            "-c",
            "IOBlockStorageDriver",
        ];
        parse_written(&self.ask(TOOL, &args)?)
    }
}

fn parse_written(said: &[u8]) -> Result<BTreeMap<String, Written>> {
    let mut all = BTreeMap::new();
    if said.iter().all(u8::is_ascii_whitespace) {
        // No driver at all.
        return Ok(all);
    }
    let value = parse(TOOL, said)?;
    for driver in dicts(TOOL, &value)? {
        let Some(statistics) = driver.dict("Statistics") else {
            continue;
        };
        let media = driver.list("IORegistryEntryChildren")?;
        let is_whole = |media: &&Dict<'_>| media.flag("Whole").unwrap_or(true);
        // Without a medium there is nothing to name.
        if let Some(name) = media
            .iter()
            .filter(is_whole)
            .find_map(|media| media.text("BSD Name"))
        {
            let written = Written {
                operations: statistics.needed_number("Operations (Write)")?,
                bytes: statistics.needed_number("Bytes (Write)")?,
            };
            all.insert(checked_id(name)?.to_owned(), written);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_counted_by_disk() {
        let said = include_bytes!("shapes/ioreg.plist");
        let written = parse_written(said).unwrap();
        let names: Vec<_> = written.keys().map(String::as_str).collect();
        assert_eq!(names, ["disk0", "disk4"]);
        let disk0 = Written {
            operations: 49_028_898,
            bytes: 1_543_807_442_944,
        };
        assert_eq!(written["disk0"], disk0);
        let text = String::from_utf8(said.to_vec()).unwrap();
        for (from, to) in [
            ("<integer>", "<integer>-"),
            ("Bytes (Write)", "Bytes"),
            ("<string>disk0", "<string>../disk0"),
            (
                "<key>IORegistryEntryChildren</key>",
                "<key>IORegistryEntryChildren</key><string/><key>a</key>",
            ),
        ] {
            assert!(
                parse_written(text.replace(from, to).as_bytes()).is_err(),
                "{from}"
            );
        }
        for end in (0..said.len()).step_by(5) {
            let _ = parse_written(&said[..end]);
        }
        assert!(parse_written(b"\n").unwrap().is_empty());
    }
}
