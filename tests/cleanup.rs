//! What `cleanup` removes, and what it does not touch.

use holdstill::run::{Hooks, Run, Watched};

use crate::common::btrfs::{Scene, making};
use crate::common::{Mount, holdstill as program, needs_root, shell};

#[test]
fn privileged_snapshots_of_dead_runs_are_cleaned_up_those_of_live_ones_stay() {
    needs_root!();
    let scene = Scene::make(&making("", 1, ""));
    let id = |text: &str| format!("{text}{}", std::process::id());
    let (dead, alive) = (id("dead"), id("alive"));
    let live_run = Run::begin(
        &alive,
        Hooks::default(),
        &[],
        Watched {
            is_guarded: true,
            ..Watched::default()
        },
    )
    .unwrap();
    let top = scene.mount("");
    shell(format!(
        "cd {}; for name in @ @home @home/user; do btrfs -q subvolume create $name; done
        mkdir @/folder",
        top.dir().display()
    ));
    let snapshot = |from: &str, to: String, options: &str| {
        shell(format!(
            "cd {}; btrfs -q subvolume snapshot {options} {from} {to}",
            top.dir().display()
        ));
        to
    };
    let [top_left, nested_left] = ["", "@home/user/"].map(|at| {
        let from = if at.is_empty() { "@" } else { at };
        snapshot(from, format!("{at}.holdstill-{dead}"), "-r")
    });
    let stay = [
        snapshot("@", format!("@/.holdstill-{alive}"), "-r"),
        // Of a person, who can write to it.
        snapshot("@", format!("@/.holdstill-{}", id("mine")), ""),
        snapshot("@", format!("@/folder/.holdstill-{dead}"), "-r"),
        snapshot("@", format!("@/holdstill-{dead}"), "-r"),
        snapshot("@", "@/.holdstill-no.run.of.ours".to_owned(), "-r"),
    ];
    // Of all that, this is what is to be seen.
    let home = Mount::new(
        scene.loops[0].path(),
        &scene.path("home"),
        "btrfs",
        "subvol=@home",
    );
    let dir = top.dir().to_owned();
    drop(top);
    let report = program::run(["cleanup", "--json"]).expect(0).last();
    // Another test may be cleaning up, too: what counts is the outcome.
    println!("{}", report["removed"]);
    let top = Mount::new(scene.loops[0].path(), &dir, "btrfs", "");
    for left in [&top_left, &nested_left] {
        assert!(!top.dir().join(left).exists(), "{left}");
    }
    for other in &stay {
        assert!(top.dir().join(other).exists(), "{other}");
    }
    drop(live_run);
    program::run(["cleanup"]).expect(0);
    assert!(!top.dir().join(&stay[0]).exists());
    assert!(stay[1..].iter().all(|other| top.dir().join(other).exists()));
    drop(home);
}
