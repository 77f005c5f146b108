//! A look at one device: sysfs, and for mapped devices the kernel's answers about their tables.

use std::fmt::Write as _;

use super::{Counts, Makeup, Piece, Seen, md, target};
use crate::dm::{self, Table};
use crate::node::{BlockDevice, DeviceNumber};

/// Looks at a device.
///
/// # Errors
/// Why it can be no part of a stack.
pub(super) fn look(number: DeviceNumber) -> Result<Seen, String> {
    let device = BlockDevice::of(number).map_err(|error| error.to_string())?;
    let label = label(&device);
    let found = examine(&device).map_err(|why| format!("{label}: {why}"))?;
    let (makeup, counts, facts) = found;
    Ok(Seen {
        label,
        sectors: device.sectors,
        makeup,
        counts,
        facts,
    })
}

fn examine(device: &BlockDevice) -> Result<(Makeup, Counts, String), String> {
    if let Some(place) = device.partition {
        let counts = match device.is_request_based() {
            true => Counts::Requests,
            false => Counts::Bios,
        };
        let whole = Piece {
            start: 0,
            sectors: place.sectors,
            lower: device.disk,
            lower_start: place.start,
            stripe: None,
        };
        let facts = format!("partition of {} at {}", device.disk, place.start);
        return Ok((Makeup::Joined(vec![whole]), counts, facts));
    }
    if device.is_request_based() {
        return Ok((
            Makeup::Leaf,
            Counts::Requests,
            format!("disk {}", device.name),
        ));
    }
    if dm::is_mapped(device) {
        return mapped(device.number);
    }
    let array = device.sysfs().join("md");
    if array.is_dir() {
        let (members, facts) = md::read(&array, device.sectors)?;
        return Ok((Makeup::Mirrored(members), Counts::Bios, facts));
    }
    Err(
        "its writes cause no events that could be traced (it is no disk with request queues)"
            .to_owned(),
    )
}

fn mapped(number: DeviceNumber) -> Result<(Makeup, Counts, String), String> {
    let fail = |error: crate::error::Error| format!("its table cannot be had: {error}");
    let table = dm::table(number).map_err(fail)?;
    let status = match target::needs_status(&table) {
        true => Some(dm::status(number).map_err(fail)?),
        false => None,
    };
    let makeup = target::makeup(&table, status.as_ref())?;
    let counts = match makeup {
        Makeup::Mirrored(_) => Counts::Otherwise,
        _ => Counts::Bios,
    };
    Ok((makeup, counts, facts(&table)))
}

/// The table, without keys: they were left out when it was read.
fn facts(table: &Table) -> String {
    let mut facts = "table".to_owned();
    for target in &table.targets {
        let _ = write!(
            facts,
            " [{} {} {} {}]",
            target.start, target.sectors, target.kind, target.params
        );
    }
    facts
}

/// What people call it.
fn label(device: &BlockDevice) -> String {
    match std::fs::read_to_string(device.sysfs().join("dm/name")) {
        Ok(name) => format!("{} ({})", name.trim(), device.name),
        Err(_) => device.name.clone(),
    }
}
