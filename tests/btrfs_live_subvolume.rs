//! One subvolume of a mounted, busy btrfs is imaged and cloned: it is as it was at the freeze, and nothing
//! else is there.

use std::path::Path;

use crate::common::btrfs::{Making, ids, making};
use crate::common::btrfs_live::{Copy, Live, subvolumes, told};
use crate::common::btrfs_writers::Writing;
use crate::common::holdstill as program;
use crate::common::live::{Judgement, LiveWriter, judge_in};
use crate::common::volume::digests;
use crate::common::{needs_root, run, seed};

const SIZE: u64 = 768 << 20;
const BYTES: u64 = 100 << 20;

const USUAL: Making = Making {
    mount: "compress=zstd:1",
    ..making("usual", 1, "-m dup -d single")
};

#[test]
fn privileged_a_subvolume_of_a_busy_btrfs_is_imaged_and_cloned_alone() {
    needs_root!();
    let seed = seed();
    let live = Live::busy(&USUAL, SIZE, seed, BYTES, Writing::InPlaceToo);
    let home = live.dir().join("home");
    // That of the other writers lies in two subvolumes.
    let journal = live.path("journal-alone");
    let options = ["--budget", "24", "--direct", "2", "--pair", "2"];
    let ledger = LiveWriter::start(&home.join("alone"), &journal, seed, &options);
    let [whole, image, restored, cloned] =
        ["whole.still", "image.still", "restored", "cloned"].map(|name| live.path(name));
    let finished = |args: &[&Path]| {
        let report = program::run(args).expect(0).last();
        live.assert_nothing_left(report["run_id"].as_str());
        report
    };
    let report = live.backup(&whole, &[]).expect(0).last();
    live.assert_nothing_left(report["run_id"].as_str());
    let backup = ["backup", "--json", "-o"].map(Path::new);
    let report = finished(&[&backup[..], &[&image, &home]].concat());
    let imaged = told(&report);
    let clone = ["clone", "--json", "--verify", "--new-ids"].map(Path::new);
    let report = finished(&[&clone[..], &[&home, &cloned]].concat());
    assert_eq!(report["verified"], true, "{report}");
    let new = report["new_uuid"].as_str().unwrap().to_owned();
    let cloned = (cloned, told(&report), new);
    ledger.stop();

    let [all, one] = [&whole, &image].map(|image| image.metadata().unwrap().len());
    println!("an image of all: {all} bytes, of one subvolume: {one}");
    assert!(one * 2 < all, "{one} of {all} bytes");
    program::run([Path::new("verify"), &image]).expect(0);

    // The original is still mounted, and written to.
    let restore = ["restore", "--json", "--yes", "--new-ids"].map(Path::new);
    let report = program::run([&restore[..], &[&image, &restored]].concat());
    let report = report.expect(0).last();
    let target = &report["targets"][0];
    assert_eq!(target["subvolume"]["path"], "home", "{report}");
    let new = target["new_uuid"].as_str().unwrap().to_owned();
    let restored = (restored, imaged, new);

    let kept = digests(&home.join("ballast"));
    for (file, told, new) in [restored, cloned] {
        println!("{}:", file.display());
        // Told apart by another UUID.
        assert_eq!(ids(&file, 2), (new, told.fsid));
        let copy = Copy::attach(&[file], &live.path("copied"));
        copy.check();
        let mounted = copy.mount("");
        assert_eq!(subvolumes(mounted.dir()), ["home"]);
        assert_eq!(program::listing(mounted.dir()), ["home"]);
        let home = mounted.dir().join("home");
        assert!(!home.join("nested").exists());
        assert!(
            digests(&home.join("ballast")) == kept,
            "of what nobody changed"
        );
        let at = Judgement::Realtime(told.instant);
        let found = judge_in(&[&home.join("alone")], &journal, at);
        print!("{}", found.unwrap_or_else(|wrong| panic!("{wrong}")));
        let new = home.join("new");
        std::fs::write(&new, vec![7; 300_000]).unwrap();
        run("sync", [Path::new("-f"), &new]);
        drop(mounted);
        copy.check();
    }
}
