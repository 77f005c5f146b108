//! What a container says of its volumes and their snapshots. None of it is encrypted.

use zerocopy::little_endian::U64;

use super::blocks::{Blocks, Expected, check_virtual, damaged, part};
use super::btree;
use super::checkpoint::Checkpoint;
use super::format::{
    KEY_ID_MASK, KEY_SNAPSHOT, KEY_TYPE_SHIFT, OMAP_DELETED, ObjectMapKey, ObjectMapValue,
    SnapshotValue, TYPE_VOLUME, VOLUME_MAGIC, VOLUME_SEALED, VOLUME_UNENCRYPTED, VolumeSuperblock,
};
use crate::error::Result;
use crate::fs::{Snapshot, Volume, probe};
use crate::units::ByteLen;

/// Names of the bits of a volume's role, and of the number above them.
const ROLE_BITS: [&str; 6] = ["system", "user", "recovery", "vm", "preboot", "installer"];
const ROLE_NUMBERS: [&str; 11] = [
    "data",
    "baseband",
    "update",
    "xart",
    "hardware",
    "backup",
    "sidecar",
    "reserved",
    "enterprise",
    "reserved",
    "prelogin",
];

/// The volumes of a checkpoint, in the container's order.
///
/// # Errors
/// [`Damaged`](crate::error::Kind::Damaged) if what leads to one of them is; else if reading fails.
pub(super) fn all(blocks: &Blocks<'_>, checkpoint: &Checkpoint) -> Result<Vec<Volume>> {
    let oids = checkpoint
        .superblock
        .volume_oids
        .iter()
        .map(|oid| oid.get());
    let oids: Vec<u64> = oids.filter(|oid| *oid != 0).collect();
    let newest = checkpoint.xid();
    // By each id its newest place; later transactions come later.
    let mut places: Vec<Option<u64>> = vec![None; oids.len()];
    btree::for_each(blocks, checkpoint.object_tree, newest, &mut |key, value| {
        let key: &ObjectMapKey = part(key, 0, "a key of the object map")?;
        let value: &ObjectMapValue = part(value, 0, "a value of the object map")?;
        let index = oids.iter().position(|oid| *oid == key.oid.get());
        if let Some(index) = index.filter(|_| key.xid.get() <= newest) {
            let is_there = value.flags.get() & OMAP_DELETED == 0;
            places[index] = is_there.then(|| value.address.get());
        }
        Ok(())
    })?;
    let volume = |(oid, place): (&u64, Option<u64>)| {
        let place = place.ok_or_else(|| damaged(format!("there is no volume {oid}")))?;
        volume(blocks, place, *oid, newest)
    };
    oids.iter().zip(places).map(volume).collect()
}

fn volume(blocks: &Blocks<'_>, address: u64, oid: u64, newest: u64) -> Result<Volume> {
    let name = "a volume's superblock";
    let block = blocks.read(address)?;
    check_virtual(
        &block,
        oid,
        Expected {
            name,
            kind: TYPE_VOLUME,
            newest,
        },
    )?;
    let superblock: &VolumeSuperblock = part(&block, 0, name)?;
    if superblock.magic.get() != VOLUME_MAGIC {
        return Err(damaged(format!("{name} ({oid}) has another magic")));
    }
    Ok(Volume {
        name: probe::text(&superblock.name).unwrap_or_default(),
        uuid: uuid::Uuid::from_bytes(superblock.uuid).to_string(),
        roles: roles(superblock.role.get()),
        is_encrypted: superblock.flags.get() & VOLUME_UNENCRYPTED == 0,
        is_sealed: superblock.incompat.get() & VOLUME_SEALED != 0,
        used: ByteLen(
            superblock
                .allocated_blocks
                .get()
                .saturating_mul(blocks.size),
        ),
        snapshots: match superblock.snapshots.get() {
            0 => Vec::new(),
            _ => snapshots(blocks, superblock.snapshot_tree.get(), newest)?,
        },
    })
}

fn roles(role: u16) -> Vec<&'static str> {
    let bits = (0..).zip(ROLE_BITS);
    let mut names: Vec<&str> = bits
        .filter(|(bit, _)| role >> bit & 1 != 0)
        .map(|(_, name)| name)
        .collect();
    match usize::from(role >> ROLE_BITS.len()) {
        0 => {}
        number => names.push(ROLE_NUMBERS.get(number - 1).unwrap_or(&"reserved")),
    }
    names
}

fn snapshots(blocks: &Blocks<'_>, root: u64, newest: u64) -> Result<Vec<Snapshot>> {
    let mut found = Vec::new();
    btree::for_each(blocks, root, newest, &mut |key, value| {
        let key: &U64 = part(key, 0, "a key of a snapshot")?;
        if key.get() >> KEY_TYPE_SHIFT != KEY_SNAPSHOT {
            return Ok(());
        }
        let head: &SnapshotValue = part(value, 0, "a snapshot")?;
        let name = value.get(size_of::<SnapshotValue>()..);
        let name = name.and_then(|name| name.get(..usize::from(head.name_len.get())));
        let name = name.ok_or_else(|| damaged("the name of a snapshot is cut off"))?;
        found.push(Snapshot {
            name: probe::text(name).unwrap_or_default(),
            transaction: key.get() & KEY_ID_MASK,
            created: jiff::Timestamp::from_nanosecond(i128::from(head.created.get())).ok(),
        });
        Ok(())
    })?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_bits_or_a_number() {
        assert_eq!(roles(0), [""; 0]);
        assert_eq!(roles(0x1), ["system"]);
        assert_eq!(roles(0x40), ["data"]);
        assert_eq!(roles(0x12), ["user", "preboot"]);
        assert_eq!(roles(11 << 6), ["prelogin"]);
        assert_eq!(roles(0xffff).last(), Some(&"reserved"));
    }
}
