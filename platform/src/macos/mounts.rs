//! What is mounted, by getfsstat(2) and statfs(2).

use std::ffi::{CStr, CString, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::names::mounted_node;
use crate::error::{Context, Error, Result};
use crate::mounts::{Mount, Place};
use crate::node::DeviceNumber;

/// Room for mounts that appear between two questions.
const SPARE: usize = 16;

/// How often is asked again, if the room did not do.
const TRIES: u32 = 10;

/// `st_dev` of a mount is not said to be the number of its device; its source names that.
pub(crate) fn is_of_device(_: DeviceNumber) -> bool {
    false
}

/// The block device at a path below `/dev`.
pub(crate) fn device_in_dev(below: &Path) -> Option<DeviceNumber> {
    let metadata = std::fs::metadata(Path::new("/dev").join(below)).ok()?;
    let is_block = metadata.file_type().is_block_device();
    is_block.then(|| DeviceNumber::from_raw(metadata.rdev()))
}

/// See [`crate::mounts::of_this_process`]. Nobody is asked who might not answer, such as a server.
pub(crate) fn of_this_process() -> Result<Vec<Mount>> {
    let what = "the list of mounts";
    let mut room = SPARE;
    for _ in 0..TRIES {
        // SAFETY: integers and arrays of them, for which zeros are values.
        let mut list = vec![unsafe { std::mem::zeroed::<libc::statfs>() }; room];
        let bytes = list.len() * size_of::<libc::statfs>();
        let bytes = libc::c_int::try_from(bytes).map_err(|_| Errno::ENOMEM);
        let bytes = bytes.context("cannot read", what)?;
        // SAFETY: memory of so many bytes, which the kernel fills with whole structs.
        let count = unsafe { libc::getfsstat(list.as_mut_ptr(), bytes, libc::MNT_NOWAIT) };
        let count = Errno::result(count).context("cannot read", what)?;
        let count = usize::try_from(count).unwrap_or(0);
        if count < list.len() {
            return Ok(list.iter().take(count).map(mount).collect());
        }
        // Full: there may be more. How many, is said where there is no room at all.
        // SAFETY: a null pointer asks for the number alone.
        let all = unsafe { libc::getfsstat(std::ptr::null_mut(), 0, libc::MNT_NOWAIT) };
        let all = Errno::result(all).context("cannot read", what)?;
        room = usize::try_from(all).unwrap_or(0) + SPARE;
    }
    Err(Error::other("cannot read", what, "it grows all the time"))
}

/// See [`Place::of`].
pub(crate) fn place_of(path: &Path) -> Result<Place> {
    let resolved = std::fs::canonicalize(path).context("cannot look up", path)?;
    let name = CString::new(resolved.as_os_str().as_bytes()).map_err(io::Error::from);
    let name = name.context("cannot look up", path)?;
    // SAFETY: integers and arrays of them, for which zeros are values.
    let mut found: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: a terminated string, and memory for one struct; both outlive the call.
    let done = unsafe { libc::statfs(name.as_ptr(), &raw mut found) };
    Errno::result(done).context("cannot find the mount of", path)?;
    let mount = mount(&found);
    Ok(Place {
        is_mount_point: mount.point == resolved,
        mount,
        path: resolved,
    })
}

/// See [`Place::of_open`].
pub(crate) fn place_of_open(file: &File, path: &Path) -> Result<Place> {
    place_of(&super::located::path_of(file).context("cannot find the mount of", path)?)
}

fn mount(found: &libc::statfs) -> Mount {
    // SAFETY: `fsid_t` is two 32-bit integers, of which the first is `st_dev` of the files.
    let device = unsafe { (&raw const found.f_fsid).cast::<i32>().read_unaligned() };
    let is_read_only = found.f_flags & libc::MNT_RDONLY.cast_unsigned() != 0;
    Mount {
        id: device.cast_unsigned(),
        parent: 0,
        device: DeviceNumber::from_raw(i64::from(device).cast_unsigned()),
        root: PathBuf::from("/"),
        point: text(&found.f_mntonname).into(),
        fs_type: text(&found.f_fstypename).to_string_lossy().into_owned(),
        source: mounted_node(text(&found.f_mntfromname)),
        options: if is_read_only { "ro" } else { "rw" }.to_owned(),
        super_options: String::new(),
    }
}

/// Text up to a zero byte.
fn text(chars: &[libc::c_char]) -> OsString {
    let bytes: Vec<u8> = chars.iter().map(|char| char.cast_unsigned()).collect();
    let text = CStr::from_bytes_until_nul(&bytes).map_or(bytes.as_slice(), CStr::to_bytes);
    OsStr::from_bytes(text).to_owned()
}
