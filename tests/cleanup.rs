//! What `cleanup` removes, and what it does not touch.

use holdstill::freeze::session::{Hooks, Session, Watched};

use crate::common::btrfs::{Scene, making};
use crate::common::{Mount, holdstill as program, needs_root, run, shell};

#[test]
fn privileged_snapshots_of_dead_runs_are_cleaned_up_those_of_live_ones_stay() {
    needs_root!();
    let scene = Scene::make(&making("", 1, ""));
    let id = |text: &str| format!("{text}{}", std::process::id());
    let (dead, alive) = (id("dead"), id("alive"));
    let live_run = Session::begin(
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

/// What is done is told, of which run and when that began; a dry run tells it before, and changes nothing.
#[test]
fn privileged_cleanup_says_what_it_does_for_whom_and_before_it_does() {
    needs_root!();
    let dir = crate::common::temp_dir();
    let records = dir.path().join("records");
    std::fs::create_dir(&records).unwrap();
    std::fs::create_dir_all("/var/lib/holdstill").unwrap();
    let part = dir.path().join(".image.1.part");
    std::fs::write(&part, "half").unwrap();
    let (id, begun) = ("dryrun0123", "2026-01-02T03:04:05Z");
    let record = records.join(format!("{id}.json"));
    let content = serde_json::json!({
        "pid": 1, "begun": begun,
        "freezes": [{"point": dir.path().join("gone"), "device": "7:1000", "sequence": null, "boot": null}],
        "parts": [{"path": &part, "inode": null}],
    });
    std::fs::write(&record, content.to_string()).unwrap();
    // With records of its own: no other run's are seen.
    let script = format!(
        "mount --bind {} /var/lib/holdstill; exec {} cleanup $0",
        records.display(),
        env!("CARGO_BIN_EXE_holdstill")
    );
    let cleanup = |options: &str| {
        run(
            "unshare",
            ["-m", "sh", "-ec", &script.replace("$0", options)],
        )
    };
    let actions = |said: &str| {
        let report: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
        let actions = report["actions"].as_array().unwrap().clone();
        let ours = actions.into_iter().filter(|action| action["run_id"] == id);
        (report["dry_run"].clone(), ours.collect::<Vec<_>>())
    };
    let expected = serde_json::json!({
        "action": "removed", "kind": "part file", "name": part, "run_id": id, "begun": begun,
    });
    let (is_dry, told) = actions(&cleanup("--dry-run --json"));
    assert_eq!((is_dry, told), (true.into(), vec![expected.clone()]));
    let said = cleanup("--dry-run");
    let line = format!("part file {}, of run {id}, begun {begun}", part.display());
    assert!(said.contains(&format!("would remove {line}")), "{said}");
    assert!(said.contains("1 dead runs would be cleaned up"), "{said}");
    assert!(part.exists() && record.exists());
    let (is_dry, told) = actions(&cleanup("--json"));
    assert_eq!((is_dry, told), (false.into(), vec![expected]));
    assert!(!part.exists() && !record.exists());
}
