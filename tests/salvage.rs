//! Damaged images: what `restore --salvage` saves, what `verify` reports; and images that are not the
//! expected ones.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use holdstill::extent::Extent;
use holdstill::image::format::{BLOCK, CELL};
use holdstill::image::tables::{Content, Run as BlockRun};
use holdstill::pipeline::store::Compression;
use serde_json::Value;

use crate::common::holdstill::{Run, command, finish, run, run_from, wait};
use crate::common::reseal::{records, reseal};
use crate::common::{Rng, count, seed, temp_dir};
use crate::image::image_of_runs;

const POISON: u8 = 0xa5;

/// A source and its image, in a folder of their own.
struct Scene {
    dir: tempfile::TempDir,
    source: Vec<u8>,
    image: Vec<u8>,
}

impl Scene {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Puts a changed image in place.
    fn put(&self, image: &[u8]) -> PathBuf {
        let path = self.path("changed");
        std::fs::write(&path, image).unwrap();
        path
    }

    /// A target that is there already and holds something else.
    fn target(&self) -> PathBuf {
        let (poison, path) = (self.path("poison"), self.path("target"));
        std::fs::write(&poison, vec![POISON; self.source.len()]).unwrap();
        // By another process: children of tests beside this one may inherit what is open here.
        crate::common::run("cp", [&poison, &path]);
        path
    }

    /// Salvages `image`; what was written, and the events about damage.
    fn salvage(&self, image: &[u8]) -> (Vec<u8>, Vec<Value>) {
        let (image, target) = (self.put(image), self.target());
        let args = ["restore", "--salvage", "--yes", "--json"].map(Path::new);
        let run = run(args.into_iter().chain([image.as_path(), target.as_path()])).expect(4);
        assert_eq!(run.last()["kind"], "damaged", "{run}");
        (std::fs::read(&target).unwrap(), damaged(&run))
    }
}

fn damaged(run: &Run) -> Vec<Value> {
    let lines = run.json().into_iter();
    lines.filter(|line| line["event"] == "damaged").collect()
}

fn scene(compress: &str, source: Vec<u8>) -> Scene {
    let dir = temp_dir();
    let [path, image] = ["source", "image"].map(|name| dir.path().join(name));
    std::fs::write(&path, &source).unwrap();
    let args = ["backup", "--compress", compress, "--all-blocks", "-o"].map(Path::new);
    run(args.into_iter().chain([image.as_path(), path.as_path()])).expect(0);
    let image = std::fs::read(&image).unwrap();
    Scene { dir, source, image }
}

/// Twelve MiB and a bit that no compressor makes smaller.
fn noise() -> Vec<u8> {
    let mut source = vec![0; 12 * CELL as usize + 512];
    Rng(seed()).fill(&mut source);
    source
}

/// The volume's bytes that the data record at `position` has.
fn range_of(image: &[u8], position: usize) -> Range<usize> {
    let at = |at: usize, len: usize| {
        let mut number = [0; 8];
        number[..len].copy_from_slice(&image[position + at..position + at + len]);
        u64::from_le_bytes(number) as usize
    };
    at(40, 8)..at(40, 8) + at(56, 4)
}

fn kind_of(image: &[u8], position: usize) -> u8 {
    image[position + 4]
}

fn flip(image: &[u8], at: usize) -> Vec<u8> {
    let mut image = image.to_vec();
    image[at] ^= 0x10;
    image
}

#[test]
fn salvage_loses_the_damaged_record_alone() {
    let scene = scene("zstd:1", noise());
    let positions = records(&scene.image);
    let data: Vec<usize> = positions
        .iter()
        .copied()
        .filter(|at| kind_of(&scene.image, *at) == 2)
        .collect();
    assert!(data.len() > 4);
    // Header, tables and payload; of the first, a middle and the last record.
    for at in [data[0], data[2], data[data.len() - 1]] {
        let lost = range_of(&scene.image, at);
        let mut expected = scene.source.clone();
        expected[lost.clone()].fill(0);
        let next = positions[positions.binary_search(&at).unwrap() + 1];
        for offset in [26, 100, next - at - 16] {
            let (got, events) = scene.salvage(&flip(&scene.image, at + offset));
            assert!(got == expected, "record at {at}, byte {offset}");
            let [event] = events.as_slice() else {
                panic!("{events:?}")
            };
            assert_eq!(event["state"], "lost");
            assert_eq!(event["volume"], 1);
            assert_eq!(event["position"], at);
            assert_eq!(
                event["ranges"],
                serde_json::json!([[lost.start, lost.len()]])
            );
        }
    }
}

#[test]
fn salvage_gives_everything_where_no_data_is_damaged() {
    let scene = scene("none", noise());
    let positions = records(&scene.image);
    let mut places: Vec<usize> = positions
        .iter()
        .filter(|at| kind_of(&scene.image, **at) != 2)
        .flat_map(|at| [at + 5, at + 97, at + 130])
        .collect();
    // File header and its padding, padding of a record, footer and the padding before it.
    let pad = positions[2] - 3;
    places.extend([
        3,
        50,
        2000,
        scene.image.len() - 4000,
        scene.image.len() - 100,
    ]);
    if scene.image[pad] == 0 {
        places.push(pad);
    }
    for place in places {
        let image = flip(&scene.image, place);
        let (got, _) = scene.salvage(&image);
        assert!(got == scene.source, "byte {place}");
        let strict = run([Path::new("verify"), &scene.put(&image)]).expect(4);
        assert!(strict.stderr.contains("damaged") || place < 16, "{strict}");
    }
}

#[test]
fn salvage_gives_what_came_before_the_cut() {
    let scene = scene("zstd:1", noise());
    let positions = records(&scene.image);
    let cut = positions[4] + 1000;
    let whole = range_of(&scene.image, positions[3]).end;
    let mut expected = scene.source.clone();
    expected[whole..].fill(0);
    let (image, target) = (scene.put(&scene.image[..cut]), scene.target());
    let args = ["restore", "--salvage", "--yes", "--json"].map(Path::new);
    let done = run(args.into_iter().chain([image.as_path(), target.as_path()])).expect(4);
    assert_eq!(done.last()["kind"], "truncated");
    assert!(std::fs::read(&target).unwrap() == expected);
    let rest = scene.source.len() - whole;
    assert_eq!(
        damaged(&done)[0]["ranges"],
        serde_json::json!([[whole, rest]])
    );
    // The same from a stream; and without --salvage nothing is left.
    let target = scene.path("new");
    let args = [Path::new("restore"), Path::new("-"), &target];
    run_from(&image, args).expect(4);
    assert!(!target.exists());
    run_from(&image, args.into_iter().chain([Path::new("--salvage")])).expect(4);
    assert!(std::fs::read(&target).unwrap() == expected);
}

/// The runs of a record, and where its payload begins and ends in the image.
fn contents(image: &[u8], at: usize) -> (Vec<(Range<usize>, u32)>, Range<usize>) {
    let number = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap()) as usize;
    let mut block = range_of(image, at).start / BLOCK as usize;
    let extents = number(at + 48);
    let run = |entry: usize| {
        let len_kind = number(entry + 4);
        let start = block + number(entry);
        block = start + (len_kind & 0x3fff_ffff);
        let range = start * BLOCK as usize..block * BLOCK as usize;
        (range, (len_kind >> 30) as u32)
    };
    let runs = (0..extents).map(|n| at + 96 + 8 * n).map(run).collect();
    let payload = at + 96 + 8 * extents + 32 * number(at + 52) + number(at + 64);
    (runs, payload..payload + number(at + 60))
}

/// What the records that are intact in front of a cut say, on a target of zeros. The data of one whose
/// payload is cut are zeros; the image is not compressed.
fn intact_before(image: &[u8], cut: usize, len: usize) -> Vec<u8> {
    let mut target = vec![0; len];
    for at in records(image) {
        if kind_of(image, at) != 2 {
            continue;
        }
        let (runs, payload) = contents(image, at);
        if payload.start > cut {
            break;
        }
        let mut from = payload.start;
        for (range, kind) in runs {
            if kind == 0 && payload.end <= cut {
                let data = &image[from..from + range.len()];
                target[range.clone()].copy_from_slice(data);
                from += range.len();
            } else {
                target[range].fill(0);
            }
        }
    }
    target
}

/// Three passes: data, then data, zeros and trims over it, twice.
fn image_of_passes() -> (Vec<u8>, Vec<u8>) {
    let size = 6 * CELL;
    let mut rng = Rng(seed());
    let mut passes = Vec::new();
    for pass in 0..3 {
        let mut source = vec![0; size as usize];
        rng.fill(&mut source);
        let step = [CELL, CELL / 2, CELL / 4][pass];
        let kinds = [Content::Data, Content::Zero, Content::Trim];
        let run = |(number, start): (usize, u64)| BlockRun {
            extent: Extent::new(start, step / 2),
            content: if pass == 0 {
                Content::Data
            } else {
                kinds[number % 3]
            },
        };
        let runs: Vec<_> = (0..size)
            .step_by(step as usize)
            .enumerate()
            .map(run)
            .collect();
        passes.push((source, runs));
    }
    let image = image_of_runs(&passes, Compression::None);
    let whole = intact_before(&image, image.len(), size as usize);
    (image, whole)
}

/// Wherever an image ends: what is intact before that is written, the rest is named, and the number of
/// threads makes no difference.
#[test]
fn salvage_of_a_cut_image_writes_or_lists_everything() {
    let (image, whole) = image_of_passes();
    let dir = temp_dir();
    let [path, target] = ["image", "target"].map(|name| dir.path().join(name));
    std::fs::write(&path, &image).unwrap();
    run([Path::new("restore"), &path, &target]).expect(0);
    assert!(std::fs::read(&target).unwrap() == whole);
    let mut rng = Rng(seed());
    let positions = records(&image);
    // Whether a later pass was to follow the first, nobody can tell.
    let is_later = |at: &&usize| kind_of(&image, **at) == 2 && image[**at + 36] > 0;
    let second = *positions.iter().find(is_later).unwrap();
    let first = intact_before(&image, second - 1, whole.len());
    let mut cuts: Vec<usize> = positions[1..].to_vec();
    for _ in 0..count(8, 400) {
        let at = rng.some(&positions[1..], 1)[0];
        let next = *positions
            .iter()
            .find(|next| **next > *at)
            .unwrap_or(&image.len());
        cuts.push(at + rng.below((next - at) as u64) as usize);
    }
    for cut in cuts {
        std::fs::write(&path, &image[..cut]).unwrap();
        let expected = intact_before(&image, cut, whole.len());
        for threads in rng.some(&["1", "2", "3", "4", "8"], count(2, 5)) {
            std::fs::write(&target, vec![POISON; whole.len()]).unwrap();
            let args = [
                "restore",
                "--salvage",
                "--yes",
                "--json",
                "--threads",
                threads,
            ];
            let args = args
                .map(Path::new)
                .into_iter()
                .chain([path.as_path(), &target]);
            let done = run(args).expect(4);
            let got = std::fs::read(&target).unwrap();
            assert!(got == expected, "cut at {cut}, {threads} threads: {done}");
            let mut named = vec![false; whole.len() / BLOCK as usize];
            for event in damaged(&done) {
                for range in event["ranges"].as_array().unwrap() {
                    let [start, len] = [0, 1].map(|at| range[at].as_u64().unwrap() / BLOCK);
                    named[start as usize..][..len as usize].fill(true);
                }
            }
            let due = if cut < second + 5000 { &first } else { &whole };
            let blocks = got.chunks(BLOCK as usize).zip(due.chunks(BLOCK as usize));
            for (number, (got, due)) in blocks.enumerate() {
                let is_told = got == due || named[number];
                assert!(
                    is_told,
                    "cut at {cut}, {threads} threads, block {number}: {done}"
                );
            }
        }
    }
}

/// A header is lost, and the end of the image with the index that would say whose it was.
#[test]
fn a_lost_record_that_nothing_tells_the_place_of_is_named_where_it_may_have_been() {
    let scene = scene("none", noise());
    let positions = records(&scene.image);
    let lost = range_of(&scene.image, positions[3]);
    let cut = flip(&scene.image, positions[3] + 30)[..positions[6]].to_vec();
    let image = scene.put(&cut);
    let target = scene.target();
    let args = ["restore", "--salvage", "--yes", "--json"].map(Path::new);
    let done = run(args.into_iter().chain([image.as_path(), target.as_path()])).expect(4);
    let unknown: Vec<Value> = damaged(&done)
        .into_iter()
        .filter(|event| event["state"] == "unknown" && event["volume"] == 1)
        .collect();
    let [event] = unknown.as_slice() else {
        panic!("{done}")
    };
    assert_eq!(
        event["ranges"],
        serde_json::json!([[lost.start, lost.len()]])
    );
    let end = range_of(&scene.image, positions[5]).end;
    let mut expected = scene.source.clone();
    expected[lost].fill(0);
    expected[end..].fill(0);
    assert!(std::fs::read(&target).unwrap() == expected);
}

/// An image that says it is better than one of its volumes would be believed.
#[test]
fn an_image_graded_better_than_its_volume_is_damaged() {
    let scene = scene("zstd:1", vec![9; 3 << 20]);
    let unknown = b"\"grade\":\"unknown\"";
    let is_there = |part: &[u8]| part == unknown;
    let places: Vec<usize> = (0..scene.image.len() - unknown.len())
        .filter(|at| is_there(&scene.image[*at..*at + unknown.len()]))
        .collect();
    // That of the image and that of its volume.
    let [of_image, of_volume] = places[..] else {
        panic!("{places:?}")
    };
    for (at, grade) in [(of_volume, "clean"), (of_image, "clean")] {
        let mut image = scene.image.clone();
        // As long as what was there: JSON does not mind blanks.
        let value = format!("{:<9}", format!("\"{grade}\""));
        image[at + 8..at + 17].copy_from_slice(value.as_bytes());
        reseal(&mut image);
        let (image, target) = (scene.put(&image), scene.path("new"));
        let says = |run: Run| run.expect(4).says("not the worst of its volumes");
        says(run([Path::new("verify"), &image]));
        says(run([Path::new("inspect"), &image]));
        says(run([Path::new("restore"), &image, &target]));
        says(run_from(&image, ["verify", "-"]));
        assert!(!target.exists());
    }
}

/// A volume that holds an image: where an outer header is lost, the inner records are not taken for
/// outer ones.
#[test]
fn images_inside_of_images_are_not_mistaken() {
    let inner = scene("none", noise()).image;
    let mut source = vec![7; CELL as usize];
    source.extend(&inner);
    let scene = scene("none", source);
    for at in records(&scene.image) {
        if kind_of(&scene.image, at) != 2 {
            continue;
        }
        let lost = range_of(&scene.image, at);
        let mut expected = scene.source.clone();
        expected[lost].fill(0);
        let (got, events) = scene.salvage(&flip(&scene.image, at + 30));
        assert!(got == expected, "record at {at}");
        assert_eq!(events.len(), 1, "{events:?}");
    }
}

/// `verify` finds all damaged places, not only the first.
#[test]
fn verify_reports_every_damaged_record() {
    let scene = scene("zstd:1", noise());
    let positions = records(&scene.image);
    let mut image = scene.image.clone();
    for at in [positions[1] + 40, positions[3] + 5000] {
        image[at] ^= 1;
    }
    let verify = run([Path::new("verify"), Path::new("--json"), &scene.put(&image)]).expect(4);
    let places: Vec<Value> = damaged(&verify)
        .iter()
        .map(|d| d["position"].clone())
        .collect();
    assert_eq!(places.len(), 2);
    assert!(places.contains(&positions[1].into()) && places.contains(&positions[3].into()));
    let error = verify.last();
    assert_eq!(error["kind"], "damaged");
    assert!(
        error["hint"]
            .as_str()
            .unwrap()
            .starts_with("2 places are damaged")
    );
}

#[test]
fn an_image_that_is_not_the_expected_one_is_refused() {
    let scene = scene("zstd:1", vec![9; 3 << 20]);
    let image = scene.put(&scene.image);
    let report = run([Path::new("verify"), Path::new("--json"), &image])
        .expect(0)
        .last();
    let id = |name: &str| report[name].as_str().unwrap().to_owned();
    let right = [
        id("image_id"),
        id("content_id"),
        id("root_hash"),
        id("root_hash").to_uppercase(),
    ];
    for id in &right {
        let target = scene.path("right");
        let expect = ["--expect-id", id.as_str()].map(Path::new);
        run([Path::new("verify"), &image].into_iter().chain(expect)).expect(0);
        run_from(
            &image,
            ["verify", "-"].map(Path::new).into_iter().chain(expect),
        )
        .expect(0);
        run([Path::new("restore"), &image, &target]
            .into_iter()
            .chain(expect))
        .expect(0);
        std::fs::remove_file(&target).unwrap();
        let stream = [Path::new("restore"), Path::new("-"), &target];
        run_from(&image, stream.into_iter().chain(expect)).expect(0);
        std::fs::remove_file(&target).unwrap();
    }
    for id in ["00".repeat(16), "00".repeat(32)] {
        let target = scene.target();
        let expect = ["--expect-id", id.as_str(), "--json"].map(Path::new);
        let refused = |run: Run| assert_eq!(run.expect(4).last()["kind"], "unexpected_image");
        refused(run([Path::new("verify"), &image].into_iter().chain(expect)));
        refused(run_from(
            &image,
            ["verify", "-"].map(Path::new).into_iter().chain(expect),
        ));
        let restore = [Path::new("restore"), Path::new("--yes"), &image, &target];
        refused(run(restore.into_iter().chain(expect)));
        // From a file nothing was touched; from a stream, no head was written.
        assert!(std::fs::read(&target).unwrap() == vec![POISON; scene.source.len()]);
        let restore = [
            Path::new("restore"),
            Path::new("--yes"),
            Path::new("-"),
            &target,
        ];
        refused(run_from(&image, restore.into_iter().chain(expect)));
        let head = &std::fs::read(&target).unwrap()[..1 << 20];
        let untouched = if id.len() == 32 { POISON } else { 0 };
        assert!(head.iter().all(|byte| *byte == untouched));
    }
    for id in ["", "12", "xy", &"0g".repeat(16)] {
        run([
            Path::new("verify"),
            &image,
            Path::new("--expect-id"),
            Path::new(id),
        ])
        .expect(2);
    }
    let target = scene.path("none");
    let args = [
        Path::new("restore"),
        Path::new("--salvage"),
        &image,
        &target,
    ];
    let expect = ["--expect-id", right[1].as_str()].map(Path::new);
    run(args.into_iter().chain(expect)).expect(2);
    assert!(!target.exists());
}

/// The content id of superseded blocks is checked too: from a file by its index.
#[test]
fn verify_checks_the_content_id_of_superseded_blocks() {
    let dir = temp_dir();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/superseded.still");
    let report = run([Path::new("verify"), Path::new("--json"), &golden])
        .expect(0)
        .last();
    let id = report["content_id"].as_str().unwrap().to_owned();
    let expect = ["--expect-id", &id].map(Path::new);
    run([Path::new("verify"), &golden].into_iter().chain(expect)).expect(0);
    run_from(&golden, ["verify", "-"]).expect(0);
    // A stream cannot be read again: then it cannot be told.
    run_from(
        &golden,
        ["verify", "-"].map(Path::new).into_iter().chain(expect),
    )
    .expect(4);
    let mut image = std::fs::read(&golden).unwrap();
    let text = format!("\"content_id\":\"{id}\"");
    let at = image
        .windows(text.len())
        .position(|part| part == text.as_bytes())
        .unwrap();
    let digit = &mut image[at + 14];
    *digit = if *digit == b'0' { b'1' } else { b'0' };
    reseal(&mut image);
    let path = dir.path().join("forged");
    std::fs::write(&path, &image).unwrap();
    run([Path::new("verify"), &path])
        .expect(4)
        .says("its content is");
}

/// A pipe that stays silent does not make the program deaf.
#[test]
fn a_silent_pipe_can_be_interrupted() {
    let scene = scene("zstd:1", noise());
    for (sent, verb) in [
        (0, "verify"),
        (5000, "restore"),
        (3 << 20, "restore"),
        (3 << 20, "verify"),
    ] {
        let target = scene.path("silent");
        let mut args = vec![PathBuf::from(verb), PathBuf::from("-")];
        if verb == "restore" {
            args.push(target.clone());
        }
        let mut command = command(&args);
        command.stdin(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut pipe = child.stdin.take().unwrap();
        std::io::Write::write_all(&mut pipe, &scene.image[..sent]).unwrap();
        // Until the signals are taken over.
        let status = PathBuf::from(format!("/proc/{}/status", child.id()));
        let caught = |text: String| {
            let mask = text
                .lines()
                .find_map(|line| line.strip_prefix("SigCgt:").map(str::to_owned));
            mask.is_some_and(|mask| u64::from_str_radix(mask.trim(), 16).unwrap() & 1 << 14 != 0)
        };
        while !caught(std::fs::read_to_string(&status).unwrap()) {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        crate::common::run("kill", ["-TERM", &child.id().to_string()]);
        wait(&command, child).expect(143);
        assert!(!target.exists());
        drop(pipe);
    }
    // A pipe that ends at once, or that is no image.
    finish(command(["verify", "-"])).expect(4);
    run_from(Path::new("/dev/zero"), ["verify", "-"]).expect(4);
}
