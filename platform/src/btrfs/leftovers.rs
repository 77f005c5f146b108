//! Snapshots that dead runs left: by a name that only this program gives, in the only place where it
//! makes them.

use super::{Filesystem, Key};
use crate::error::{Error, Result};

/// All our snapshots are called so, followed by the run's id.
const PREFIX: &str = ".holdstill-";

/// The root tree, and the kind of its items that say of a subvolume where it is
/// (`BTRFS_ROOT_TREE_OBJECTID`, `BTRFS_ROOT_BACKREF_KEY`): the key is its id, the kind and the id of
/// the subvolume it lies in.
const ROOT_TREE: u64 = 1;
const ROOT_BACKREF: u8 = 144;

/// Bytes of `struct btrfs_root_ref` before the name: inode of the folder, sequence, length of the name.
const ROOT_REF: usize = 18;

/// Ids of subvolumes are from here (`BTRFS_FIRST_FREE_OBJECTID`), as are inode numbers: the first is
/// that of the root folder.
const FIRST: u64 = 256;

/// A snapshot that some run made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// Its id.
    pub id: u64,
    /// In the root folder of which subvolume it lies.
    pub parent: u64,
    /// Its name there.
    pub name: String,
    /// Which run it is of.
    pub run_id: String,
}

/// What the snapshots of a run are called.
pub fn snapshot_name(run_id: &str) -> String {
    format!("{PREFIX}{run_id}")
}

impl Filesystem {
    /// The snapshots that live and dead runs have given a name and not deleted yet. Needs
    /// CAP_SYS_ADMIN.
    ///
    /// # Errors
    /// If the kernel does not list the subvolumes.
    pub fn leftovers(&self) -> Result<Vec<Leftover>> {
        let mut named = Vec::new();
        let min = Key::new(FIRST, 0, 0);
        self.search(ROOT_TREE, min, Key::MAX, 0, &mut |item| {
            if item.kind == ROOT_BACKREF {
                named.extend(named_by_us(item.objectid, item.offset, item.data));
            }
            Result::Ok(())
        })?;
        let mut found = Vec::new();
        for leftover in named {
            match self.subvolume(leftover.id) {
                // One that can be written to is somebody else's.
                Ok(subvolume) if subvolume.is_read_only()? => found.push(leftover),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// Deletes a snapshot of a dead run.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn delete_leftover(&self, leftover: &Leftover) -> Result<()> {
        if leftover.name != snapshot_name(&leftover.run_id) {
            return Err(Error::other(
                "cannot delete",
                &leftover.name,
                "not one of ours",
            ));
        }
        self.subvolume(leftover.parent)?
            .delete_child(&leftover.name)
    }
}

/// What the content of a ROOT_BACKREF says, if it is about one of ours.
fn named_by_us(id: u64, parent: u64, data: &[u8]) -> Option<Leftover> {
    let (head, rest) = data.split_at_checked(ROOT_REF)?;
    let folder = u64::from_le_bytes(head.get(..8)?.try_into().ok()?);
    let len = u16::from_le_bytes(head.get(16..18)?.try_into().ok()?);
    let name = std::str::from_utf8(rest.get(..len.into())?).ok()?;
    let run_id = name.strip_prefix(PREFIX).filter(|id| !id.is_empty())?;
    (folder == FIRST).then(|| Leftover {
        id,
        parent,
        name: name.to_owned(),
        run_id: run_id.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_names_in_root_folders_are_ours() {
        let item = |folder: u64, name: &str| {
            let mut item = folder.to_le_bytes().to_vec();
            item.extend(2_u64.to_le_bytes());
            item.extend(u16::try_from(name.len()).unwrap().to_le_bytes());
            item.extend(name.as_bytes());
            item
        };
        let ours = item(256, ".holdstill-4f");
        let found = named_by_us(300, 5, &ours).unwrap();
        assert_eq!(
            (found.id, found.parent, found.run_id.as_str()),
            (300, 5, "4f")
        );
        assert_eq!(found.name, snapshot_name("4f"));
        for end in 0..ours.len() {
            assert_eq!(named_by_us(300, 5, &ours[..end]), None, "{end}");
        }
        for (folder, name) in [
            (257, ".holdstill-4f"),
            (256, ".holdstill-"),
            (256, "holdstill-4f"),
        ] {
            assert_eq!(named_by_us(300, 5, &item(folder, name)), None, "{name}");
        }
    }
}
