//! Steps: the ways to make a source hold still, in one list. Plans, help, `--version --json` and the table
//! in README are made from it.

use std::fmt;

use holdstill_platform::apple::System;
use holdstill_platform::device::Geometry;
use holdstill_platform::guard::Undo;

use super::{Context, Still, Turn};
use super::{apfs, btrfs, dm, hold, lvm, none, offline, track, zfs};
use crate::error::{Error, Kind, Result};
use crate::source::Source;

/// A way to make a source hold still.
pub trait Step: fmt::Debug + Sync {
    /// Its name on the command line.
    fn name(&self) -> &'static str;

    /// In a few words, for `--help`.
    fn about(&self) -> &'static str;

    /// When it applies, for README.
    fn when(&self) -> &'static str;

    /// What it does, for README.
    fn how(&self) -> &'static str;

    /// Who takes it.
    fn rung(&self) -> Rung {
        Rung::Auto
    }

    /// When a source is copied that holds still by it.
    fn turn(&self, _no_freeze: bool) -> Turn {
        Turn::Snapshot
    }

    /// Whether it freezes or creates something that a guard has to watch over.
    fn needs_guard(&self) -> bool {
        self.turn(false) != Turn::Unused
    }

    /// Whether it makes writers wait, be it for milliseconds, and cannot do without.
    fn has_to_freeze(&self) -> bool {
        true
    }

    /// Whether whoever writes to this source would have to wait for the end of a freeze of ours.
    fn freezes(&self, _source: &Source, _no_freeze: bool) -> bool {
        false
    }

    /// Whether there is room to be made for what writers overwrite (`--cow-size`, `--cow-device`).
    fn keeps_what_is_overwritten(&self) -> bool {
        false
    }

    /// Whether the source itself is read, and not a copy of it in another place.
    fn reads_the_source(&self) -> bool {
        true
    }

    /// Why the source cannot hold still this way; `None` if nothing speaks against it.
    ///
    /// # Errors
    /// If it cannot be examined.
    fn objection(&self, source: &Source) -> Result<Option<String>>;

    /// The other devices of the source's filesystem, if they are imaged with it.
    ///
    /// # Errors
    /// If they cannot be looked for.
    fn siblings(&self, _source: &Source) -> Result<Vec<Source>> {
        Ok(Vec::new())
    }

    /// Size and sectors of the source; at most, where it is copied by way of another device.
    ///
    /// # Errors
    /// If it cannot be opened.
    fn geometry(&self, source: &Source) -> Result<Geometry> {
        source.geometry()
    }

    /// What a guard may have to undo should run `run_id` die.
    ///
    /// # Errors
    /// If the tools for that are missing.
    fn undo(&self, _source: &Source, _run_id: &str) -> Result<Vec<Undo>> {
        Ok(Vec::new())
    }

    /// Makes the sources, the devices of one filesystem, hold still: one volume each.
    ///
    /// # Errors
    /// If they cannot be.
    fn begin(&self, sources: &[&Source], context: &Context<'_>) -> Result<Box<dyn Still>>;
}

/// Who takes a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rung {
    /// `auto`, where this is not a Mac.
    Auto,
    /// `auto`, everywhere.
    AutoEverywhere,
    /// `auto`, on a Mac.
    AutoOnMac,
    /// Only who names it.
    Named,
}

/// A step of the list.
pub type AnyStep = &'static dyn Step;

/// Nobody has it mounted, held or open for writing.
pub const OFFLINE: AnyStep = &offline::Method;
/// A snapshot of a volume of ZFS.
pub const ZFS: AnyStep = &zfs::Method;
/// A commit of a mounted btrfs, whose data snapshots pin.
pub const BTRFS: AnyStep = &btrfs::Method;
/// A snapshot of LVM, thick or thin.
pub const LVM: AnyStep = &lvm::Method;
/// Its writes are tracked while it is copied; it is frozen for some milliseconds at the end.
pub const TRACK: AnyStep = &track::Method;
/// A snapshot of a mounted volume of APFS, copied into a container of its own (macOS).
pub const APFS: AnyStep = &apfs::Method;
/// A snapshot slid under the live mapping of a device-mapper device.
pub const DM: AnyStep = &dm::Method;
/// Its filesystem is frozen for the whole copy.
pub const HOLD: AnyStep = &hold::Method;
/// It is read as it is, while it may change.
pub const NONE: AnyStep = &none::Method;

/// All steps, in the order in which `auto` tries those that it takes.
pub const STEPS: [AnyStep; 9] = [OFFLINE, ZFS, BTRFS, LVM, TRACK, APFS, DM, HOLD, NONE];

/// The steps that `auto` tries on this system, in this order.
pub fn ladder() -> Vec<AnyStep> {
    let own = match System::this().is_macos() {
        true => Rung::AutoOnMac,
        false => Rung::Auto,
    };
    let is_tried = |step: &AnyStep| [Rung::AutoEverywhere, own].contains(&step.rung());
    STEPS.into_iter().filter(is_tried).collect()
}

/// The step of this name.
///
/// # Errors
/// [`Kind::Usage`] if there is none.
pub fn named(name: &str) -> Result<AnyStep> {
    let mut steps = STEPS.into_iter();
    steps.find(|step| step.name() == name).ok_or_else(|| {
        let what = format!("there is no way to freeze called `{name}`");
        Error::new(Kind::Usage, what)
    })
}

impl fmt::Display for dyn Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Steps are the same if their names are.
impl PartialEq for dyn Step {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Eq for dyn Step {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_in_readme_is_this_list() {
        let readme = include_str!("../../README.md");
        let table = readme
            .split("| step | when | how |\n| --- | --- | --- |\n")
            .nth(1);
        let rows: Vec<&str> = table
            .expect("the table")
            .lines()
            .take(STEPS.len())
            .collect();
        for (step, row) in STEPS.iter().zip(rows) {
            let expected = format!("| `{}` | {} | {} |", step.name(), step.when(), step.how());
            assert_eq!(row, expected);
        }
    }

    #[test]
    fn each_is_found_by_its_name() {
        for step in STEPS {
            assert_eq!(named(step.name()).unwrap(), step);
        }
        assert!(named("melt").is_err());
    }
}
