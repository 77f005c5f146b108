//! A mounted btrfs on a disk that does not give back what was written: where there is another copy the
//! image is exact, else the place is named.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::common::btrfs::{Making, making, number_after};
use crate::common::btrfs_chunks::{copies_of, printed_chunks};
use crate::common::btrfs_live::{Copy, Live, id_of, told};
use crate::common::btrfs_writers::Writing;
use crate::common::live::Judgement;
use crate::common::volume::digests;
use crate::common::{LoopDevice, needs_root, run, seed};

const SIZE: u64 = 512 << 20;
const BYTES: u64 = 60 << 20;

/// Where something lies: on which device (from 0), and at which byte.
#[derive(Clone, Copy, Debug)]
struct Place {
    device: usize,
    offset: u64,
}

/// All copies of a logical address. The filesystem is not mounted.
fn places_of(live: &Live, address: u64) -> Vec<Place> {
    let devices: Vec<&Path> = live.scene.loops.iter().map(LoopDevice::path).collect();
    let copies = copies_of(&printed_chunks(&devices), address);
    copies
        .into_iter()
        .map(|(devid, offset)| Place {
            device: devid as usize - 1,
            offset,
        })
        .collect()
}

/// The logical address of the first extent of a file.
fn extent_of(file: &Path) -> u64 {
    let text = run("xfs_io", ["-r", "-c", "fiemap", file.to_str().unwrap()]);
    // `0: [0..6143]: 26624..32767`, in sectors of 512 bytes.
    let line = text.lines().nth(1).expect("an extent");
    let first = line.split_whitespace().nth(2).expect("where it is");
    let first: u64 = first.split("..").next().unwrap().parse().unwrap();
    first * 512
}

/// The logical address of the root of a subvolume's tree.
fn root_of(live: &Live, subvolume: u64) -> u64 {
    let args = ["inspect-internal", "dump-tree", "-t"].map(PathBuf::from);
    let more = [
        subvolume.to_string().into(),
        live.scene.loops[0].path().to_owned(),
    ];
    let text = run("btrfs", args.into_iter().chain(more));
    let mut lines = text.lines();
    lines
        .find_map(|line| number_after(line, "leaf").or(number_after(line, "node")))
        .expect("a root")
}

/// Changes a bit of what a device holds, behind everybody's back.
fn flip(live: &Live, place: Place, at: u64) {
    let path = live.path(&format!("device{}", place.device + 1));
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let mut byte = [0];
    let offset = place.offset + at;
    File::open(path)
        .unwrap()
        .read_exact_at(&mut byte, offset)
        .unwrap();
    file.write_all_at(&[byte[0] ^ 4], offset).unwrap();
}

/// Damages one copy, and images it while it is written to.
fn one_bad_copy(making: &Making, logical: impl FnOnce(&Live) -> Vec<Place>) {
    println!("{}:", making.name);
    let mut live = Live::make(making, SIZE, seed(), BYTES);
    let places = logical(&live);
    assert_eq!(places.len(), 2, "{places:?}");
    flip(&live, places[0], 300);
    live.write(Writing::InPlaceToo);
    let image = live.path("image.still");
    let report = live.backup(&image, &[]).expect(0).last();
    live.assert_nothing_left(report["run_id"].as_str());
    let told = told(&report);
    let away = live.put_away();
    let restored = away.restore(&image, &report);
    away.judge(&restored, &told, Some(Judgement::Realtime(told.instant)));
}

/// What lies at a place.
fn read(live: &Live, place: Place) -> Vec<u8> {
    let file = File::open(live.path(&format!("device{}", place.device + 1))).unwrap();
    let mut bytes = vec![0; 4096];
    file.read_exact_at(&mut bytes, place.offset).unwrap();
    bytes
}

/// Of a file's data.
fn data(live: &Live) -> Vec<Place> {
    let file = live.dir().join("static/large");
    let logical = extent_of(&file);
    let places = live.unmounted(|| places_of(live, logical));
    let content = std::fs::read(file).unwrap();
    for place in &places {
        assert!(
            read(live, *place) == content[..4096],
            "{place:?} of {places:?}, logical {logical}"
        );
    }
    places
}

/// Of metadata that nobody changes.
fn metadata(live: &Live) -> Vec<Place> {
    let subvolume = id_of(live.dir(), "static");
    let (logical, places) = live.unmounted(|| {
        let logical = root_of(live, subvolume);
        (logical, places_of(live, logical))
    });
    for place in &places {
        // A tree block holds its own address.
        assert_eq!(
            read(live, *place)[0x30..0x38],
            logical.to_le_bytes(),
            "{place:?}"
        );
    }
    places
}

#[test]
fn privileged_a_bad_copy_on_a_live_btrfs_is_made_up_for_by_the_other() {
    needs_root!();
    one_bad_copy(&making("metadata twice", 1, "-m dup -d single"), metadata);
    one_bad_copy(
        &making("metadata on two", 2, "-m raid1 -d single"),
        metadata,
    );
    one_bad_copy(&making("data on two", 2, "-m raid1 -d raid1"), data);
    one_bad_copy(&making("data twice", 1, "-m dup -d dup"), data);
}

#[test]
fn privileged_what_has_no_good_copy_is_named() {
    needs_root!();
    for kind in [
        making("data", 1, "-m dup -d single"),
        making("data on two", 2, "-m raid1 -d raid1"),
    ] {
        println!("{}:", kind.name);
        let live = Live::make(&kind, SIZE, seed(), BYTES);
        let logical = extent_of(&live.dir().join("static/large"));
        let places = live.unmounted(|| places_of(&live, logical));
        for place in &places {
            flip(&live, *place, 8192 + 300);
        }
        let image = live.path("image.still");
        let run = live.backup(&image, &[]);
        let last = run.last();
        assert!([Some(1), Some(4)].contains(&run.code()), "{run}");
        let message = last["message"].as_str().unwrap();
        let numbers = places.iter().map(|place| place.offset + 8192);
        let mut names = numbers
            .chain([logical + 8192])
            .map(|number| number.to_string());
        assert!(
            names.any(|name| message.contains(&name)),
            "{places:?} {logical}: {message}"
        );
        live.assert_no_image(&image);
        live.assert_nothing_left(last["run_id"].as_str());

        let report = live
            .backup(&image, &["--on-read-error", "zero"])
            .expect(5)
            .last();
        let told = told(&report);
        // The original is well again.
        for place in &places {
            flip(&live, *place, 8192 + 300);
        }
        let away = live.put_away();
        let volumes = report["volumes"].as_array().unwrap();
        let lists = volumes
            .iter()
            .flat_map(|volume| volume["unreadable"].as_array().unwrap());
        let ranges: Vec<(u64, u64)> = lists
            .map(|range| (range[0].as_u64().unwrap(), range[1].as_u64().unwrap()))
            .collect();
        let holds = |place: u64| {
            let mut ranges = ranges.iter();
            ranges.any(|(start, len)| (*start..start + len).contains(&place))
        };
        assert!(holds(places[0].offset + 8192 + 300), "{report}");
        assert!(!holds(places[0].offset), "{report}");
        let bytes: u64 = ranges.iter().map(|(_, len)| len).sum();
        assert!(bytes <= 4096 * places.len() as u64, "{report}");
        let restored = away.restore(&image, &report);
        let copy = Copy::attach(&restored, &away.path("copied"));
        assert!(copy.checked().is_err(), "{told:?}");
        let mounted = copy.mount("ro");
        let read = std::fs::read(mounted.dir().join("static/large"));
        assert!(read.is_err(), "what is not known is read without an error");
        assert!(!digests(&mounted.dir().join("snapshot")).is_empty());
    }
}

#[test]
fn privileged_metadata_without_a_good_copy_are_named() {
    needs_root!();
    let live = Live::make(
        &making("metadata", 1, "-m dup -d single"),
        SIZE,
        seed(),
        BYTES,
    );
    for place in metadata(&live) {
        flip(&live, place, 300);
    }
    let image = live.path("image.still");
    for more in [&[][..], &["--on-read-error", "zero"]] {
        let run = live.backup(&image, more);
        assert!([Some(1), Some(4)].contains(&run.code()), "{run}");
        let last = run.last();
        // Found by us, or by the kernel when its subvolume was to be pinned.
        let message = last["message"].as_str().unwrap();
        let words = ["checksum", "Input/output error"];
        assert!(words.iter().any(|word| message.contains(word)), "{run}");
        live.assert_no_image(&image);
        live.assert_nothing_left(last["run_id"].as_str());
    }
}
