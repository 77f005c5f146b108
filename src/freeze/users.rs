//! What steps that read the device of a snapshot share: who uses the volume below it, and so what the
//! snapshot can be worth.

use holdstill_platform::device::Disk;
use holdstill_platform::in_use::{self, User};
use holdstill_platform::node::BlockDevice;

use crate::error::Result;
use crate::freeze::survey::{Mode, Survey};

/// Who uses a volume.
pub(super) enum Users {
    /// Only filesystems that are mounted on this host, and are frozen while the snapshot is made.
    Frozen(Mode),
    /// Nobody who writes.
    Nobody,
    /// Somebody whom nothing makes pause: a virtual machine, an iSCSI target.
    Others(String),
}

impl Users {
    /// The users of a volume. `freezes`: whether a mounted filesystem like this is frozen.
    pub(super) fn of(device: &BlockDevice, freezes: impl Fn(&User) -> bool) -> Result<Self> {
        let users = in_use::of_device(device, &[])?.users;
        let mut frozen = None;
        for user in users {
            match user {
                User::Mount { read_only, .. } if freezes(&user) => {
                    // One mount for writing is enough.
                    frozen = frozen.max(Some(Mode::read_only(read_only)));
                }
                user if user.may_write() => return Ok(Self::Others(user.to_string())),
                _ => {}
            }
        }
        Ok(frozen.map_or(Self::Nobody, Self::Frozen))
    }

    /// Examines the snapshot.
    pub(super) fn survey(&self, snapshot: &Disk, all_blocks: bool) -> Result<Survey> {
        match self {
            Self::Frozen(mode) => Survey::of_frozen(snapshot, *mode, all_blocks),
            Self::Nobody => Survey::of_offline(snapshot, &[], all_blocks),
            Self::Others(who) => Survey::of_snapshot_in_use(snapshot, who),
        }
    }
}
