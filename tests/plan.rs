//! Which step is taken when one could not make its snapshot.

use holdstill::error::{Error, Kind};
use holdstill::freeze::plan::Plan;
use holdstill::freeze::step::{self, AnyStep};

use crate::common::{LoopDevice, Mount, needs_root, run, sparse_file, temp_dir};

#[test]
fn privileged_auto_goes_on_to_the_next_step_when_a_snapshot_cannot_be_made() {
    needs_root!();
    let dir = temp_dir();
    let file = dir.path().join("volume");
    sparse_file(&file, 16 << 20);
    let device = LoopDevice::attach(&file);
    run(
        "mke2fs",
        ["-q", "-t", "ext4", device.path().to_str().unwrap()],
    );
    let _mount = Mount::new(device.path(), &dir.path().join("live"), "ext4", "");
    let source = device.path().to_str().unwrap();
    let full = || Error::new(Kind::Tool, "no snapshot").because("exit code 5\nno room");
    // As if the volume were one of LVM: what comes later in the ladder is asked of it for real.
    let planned = |named: Option<AnyStep>| {
        let mut plan = Plan::make(source, named).unwrap();
        assert_eq!(plan.step, step::TRACK);
        plan.step = step::LVM;
        plan
    };
    let try_it = |mut plan: Plan, undone: bool, is_allowed: bool| {
        let mut tried = Vec::new();
        let begin = |plan: &Plan| {
            tried.push(plan.step);
            match (plan.step.name(), undone) {
                ("lvm", true) => Err(full().undone()),
                ("lvm", false) => Err(full()),
                _ => Ok(()),
            }
        };
        let done = plan.try_steps(begin, |_| is_allowed);
        (tried, done.map(|((), warnings)| warnings), plan)
    };
    let (tried, done, plan) = try_it(planned(None), true, true);
    assert_eq!(tried, [step::LVM, step::TRACK]);
    let warnings = done.unwrap();
    let [warning] = warnings.as_slice() else {
        panic!("{warnings:?}")
    };
    assert_eq!(
        warning,
        "`lvm` could not make a snapshot, so `track` is taken: no snapshot: exit code 5: no room"
    );
    assert_eq!(plan.step, step::TRACK);
    assert!(
        plan.passed_over
            .iter()
            .any(|(step, why)| *step == step::LVM && why.contains("no room"))
    );
    // Named, or with something left behind, or where it may not: its own error.
    for (plan, undone, is_allowed) in [
        (planned(Some(step::TRACK)), true, true),
        (planned(None), false, true),
        (planned(None), true, false),
    ] {
        let (tried, done, plan) = try_it(plan, undone, is_allowed);
        assert_eq!((tried, plan.step), (vec![step::LVM], step::LVM));
        assert_eq!(done.unwrap_err().message(), "no snapshot");
    }
    // Nothing comes later.
    let mut plan = planned(None);
    plan.step = step::TRACK;
    let failed = plan.try_steps(|_| Err::<(), _>(full().undone()), |_| true);
    assert_eq!(failed.unwrap_err().message(), "no snapshot");
}
