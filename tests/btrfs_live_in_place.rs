//! A btrfs with files that are overwritten in place (`chattr +C`) is imaged without a freeze: these may be
//! newer than the commit. Either none of that was needed, and all is as after a crash, or there is no image.

use std::path::Path;

use crate::common::btrfs::{Making, making};
use crate::common::btrfs_live::{Copy, Live, told};
use crate::common::btrfs_writers::Writing;
use crate::common::live::{Judgement, LiveWriter, clock, judge_in};
use crate::common::{count, needs_root, run, seed};

const SIZE: u64 = 768 << 20;
const BYTES: u64 = 50 << 20;

const USUAL: Making = Making {
    mount: "compress=zstd:1",
    ..making("usual", 1, "-m dup -d single")
};

#[test]
fn privileged_without_a_freeze_what_is_overwritten_in_place_is_right_or_refused() {
    needs_root!();
    let seed = seed();
    for number in 0..count(2, 20) {
        let seed = seed.wrapping_add(number);
        let live = Live::busy(&USUAL, SIZE, seed, BYTES, Writing::InPlaceToo);
        let image = live.path("image.still");
        let begin = clock();
        let run = live.backup(&image, &["--no-freeze"]);
        let end = clock();
        let report = run.last();
        live.assert_nothing_left(report["run_id"].as_str());
        if run.code() != Some(0) {
            assert_eq!(run.code(), Some(3), "{run}");
            assert_eq!(report["kind"], "inconsistent", "{run}");
            let [message, hint] = ["message", "hint"].map(|name| report[name].as_str().unwrap());
            assert!(message.contains("without copy-on-write"), "{run}");
            assert!(hint.contains("--no-freeze"), "{run}");
            live.assert_no_image(&image);
            continue;
        }
        let told = told(&report);
        let away = live.put_away();
        let restored = away.restore(&image, &report);
        let how = Judgement::Crash { begin, end };
        away.judge(&restored, &told, Some(how));
    }
}

/// Who rests now and then leaves room for a window.
#[test]
fn privileged_without_a_freeze_what_was_overwritten_in_place_before_is_right() {
    needs_root!();
    let seed = seed();
    for number in 0..count(2, 20) {
        let seed = seed.wrapping_add(number);
        let live = Live::make(&USUAL, SIZE, seed, BYTES);
        let dir = live.dir().join("var/bursts");
        std::fs::create_dir(&dir).unwrap();
        run("chattr", [Path::new("+C"), &dir]);
        let [journal, image] = ["journal-bursts", "image.still"].map(|name| live.path(name));
        let options = ["--budget", "24", "--direct", "2", "--pair", "2"];
        let ledger = LiveWriter::start(&dir, &journal, seed, &options);
        let (begin, done, end) = ledger.in_bursts(|| {
            let begin = clock();
            let done = live.backup(&image, &["--no-freeze"]);
            (begin, done, clock())
        });
        ledger.stop();
        let report = done.expect(0).last();
        live.assert_nothing_left(report["run_id"].as_str());
        let told = told(&report);
        let how = Judgement::Crash { begin, end };
        let away = live.put_away();
        let restored = away.restore(&image, &report);
        away.judge(&restored, &told, Some(how));
        let copy = Copy::attach(&restored, &away.path("copied"));
        let mounted = copy.mount("");
        let found = judge_in(&[&mounted.dir().join("var/bursts")], &journal, how);
        print!("{}", found.unwrap_or_else(|wrong| panic!("{wrong}")));
    }
}
