//! A file that is written as a target must not be in use through a loop device. Lists of mounts do not
//! tell that: what was unmounted lazily, or lives in a mount namespace without a process, is in none. An
//! exclusive open (`O_EXCL`) of the loop device does: it fails while the device or one of its partitions is
//! mounted, swapped to or built on, and keeps all that away while it is held.

use std::io;

use crate::error::{Context, Error, Result};
use crate::exclusive::Claim;
use crate::extents_below::Extents;
use crate::node::{self, BlockDevice, DeviceNumber};

/// Claims on all loop devices that show bytes of a file.
#[derive(Debug)]
pub struct LoopClaims {
    claims: Vec<Claim>,
}

impl LoopClaims {
    /// Claims every loop device that shows some of these bytes.
    ///
    /// # Errors
    /// `ResourceBusy` on the first one that somebody uses; else if it cannot be asked or opened.
    pub fn over(extents: &Extents) -> Result<Self> {
        let mut claims = Vec::new();
        for device in node::disks()? {
            if device.loop_shown()?.is_none() {
                continue;
            }
            let shown = match Extents::of_device(device.number) {
                Ok(shown) => shown,
                // Whoever may not ask a loop device sees its users in the lists, or nothing of it.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => continue,
                // Detached meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if shown.common(extents).is_some() {
                claims.push(claim(&device)?);
            }
        }
        Ok(Self { claims })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.claims.len()
    }
}

/// Claims a device by its node, which must be the device's.
fn claim(device: &BlockDevice) -> Result<Claim> {
    let path = device.path();
    let claim = Claim::new(&path)?;
    let opened = claim.device().context("cannot claim", &path)?;
    match opened == device.number {
        true => Ok(claim),
        false => Err(wrong_node(device, opened)),
    }
}

fn wrong_node(device: &BlockDevice, opened: DeviceNumber) -> Error {
    let why = format!("the node is device {opened}, not {}", device.number);
    Error::invalid("cannot claim", device.path(), why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Loop, Mounted, mkfs, needs_root, run, scratch};

    #[test]
    fn privileged_an_unseen_mount_of_a_part_of_the_file_is_found() {
        needs_root!();
        let dir = scratch();
        let file = dir.path().join("file");
        let whole = Loop::sparse(&file, 64 << 20);
        let shifted = Loop::attach(&file, &["-o", "33554432"]);
        let extents = Extents::of_device(whole.number()).unwrap();
        let claim = || LoopClaims::over(&extents).map(|claims| claims.count());
        assert_eq!(claim().unwrap(), 2);
        mkfs("ext4", shifted.path());
        let mounted = Mounted::new(shifted.path(), &dir.path().join("m"), "rw");
        let open = std::fs::File::create(mounted.path().join("open")).unwrap();
        run("umount", ["-l".as_ref(), mounted.path().as_os_str()]);
        let error = claim().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy, "{error}");
        assert_eq!(error.what, shifted.path());
        drop(open);
        std::mem::forget(mounted);
        let mut tries = 0..500;
        while claim().is_err() {
            assert!(tries.next().is_some(), "it stays busy");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}
