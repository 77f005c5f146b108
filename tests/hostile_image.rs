//! Images made by somebody who means harm: changed at random in places that matter, with all checksums
//! right, so that every parser gets to see it. Nothing panics, hangs, reaches outside of a volume, or
//! takes memory without bound.

use std::path::{Path, PathBuf};

use crate::common::holdstill::run;
use crate::common::reading::read_all_ways;
use crate::common::reseal::{records, reseal};
use crate::common::{Rng, count, output, seed, temp_dir};

const FRAME: usize = 4096;

fn golden(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    std::fs::read(folder.join(name).with_extension("still")).unwrap()
}

/// A number as those who mean harm like them.
fn number(rng: &mut Rng) -> u64 {
    let edge = 1u64 << rng.below(64);
    match rng.below(6) {
        0 => 0,
        1 => u64::MAX,
        2 => edge,
        3 => edge - 1,
        4 => rng.below(300),
        _ => rng.next_u64(),
    }
}

fn put(image: &mut [u8], at: usize, value: u64, len: usize) {
    if let Some(place) = image.get_mut(at..at + len) {
        place.copy_from_slice(&value.to_le_bytes()[..len]);
    }
}

/// Changes something that a parser looks at.
fn mutate(image: &mut Vec<u8>, rng: &mut Rng) {
    let all = records(image);
    let record = all[rng.below(all.len() as u64) as usize];
    let value = number(rng);
    match rng.below(10) {
        // Fields of the file header, of a record header, of the footer.
        0 => put(image, 16 + 4 * rng.below(24) as usize, value, 4),
        1..4 => {
            let fields = [
                (4, 1),
                (5, 1),
                (6, 2),
                (24, 8),
                (32, 4),
                (36, 4),
                (40, 8),
                (48, 4),
            ];
            let more = [(52, 4), (56, 4), (60, 4), (64, 4), (76, 8)];
            let fields: Vec<_> = fields.into_iter().chain(more).collect();
            let (at, len) = fields[rng.below(fields.len() as u64) as usize];
            put(image, record + at, value, len);
        }
        4 => {
            let footer = image.len() - FRAME;
            put(image, footer + 16 + 8 * rng.below(26) as usize, value, 8);
        }
        // Tables and payload: extents, JSON, index.
        5 => put(image, record + 96 + 4 * rng.below(8) as usize, value, 4),
        6 => put(image, record + 128 + 4 * rng.below(60) as usize, value, 4),
        7 => {
            // A digit of some JSON.
            let digits = |at: &usize| image[*at].is_ascii_digit();
            let digits: Vec<usize> = (record + 128..image.len())
                .take(2000)
                .filter(digits)
                .collect();
            if !digits.is_empty() {
                let at = digits[rng.below(digits.len() as u64) as usize];
                image[at] = *b"0123456789-.eE[{}]\",x"
                    .get(rng.below(21) as usize)
                    .unwrap();
            }
        }
        // Records in another place, twice, or not at all.
        8 => {
            let other = all[rng.below(all.len() as u64) as usize];
            let header: [u8; 96] = image[record..record + 96].try_into().unwrap();
            image[other..other + 96].copy_from_slice(&header);
        }
        _ => {
            let at = rng.below(image.len() as u64) as usize;
            let len = rng.below(5000) as usize;
            match rng.below(3) {
                0 => image.truncate(at.max(2 * FRAME)),
                1 => drop(image.splice(at..at, vec![0; len / 8 * 8])),
                _ => drop(image.drain(at..(at + len / 8 * 8).min(image.len()))),
            }
        }
    }
}

#[test]
fn no_image_does_harm() {
    let mut rng = Rng(seed());
    let images = ["plain", "superseded", "volumes", "stream", "compatible"].map(golden);
    let mut accepted = 0;
    let rounds = count(3_000, 100_000);
    for round in 0..rounds {
        let mut image = images[(round % images.len() as u64) as usize].clone();
        for _ in 0..=rng.below(3) {
            if image.len() < 3 * FRAME || records(&image).is_empty() {
                break;
            }
            mutate(&mut image, &mut rng);
        }
        if image.len() < 2 * FRAME {
            continue;
        }
        if rng.below(8) > 0 {
            reseal(&mut image);
        }
        accepted += u64::from(read_all_ways(&image, &mut |limit| rng.below(limit)));
    }
    // Some changes are no damage (a label, a time): then the mutator does reach behind the checksums.
    println!("{accepted} of {rounds} images were accepted");
    assert!(accepted > 0);
}

/// Replaces the payload of the record of `kind` and lets everything behind it move.
fn with_payload(image: &[u8], kind: u8, payload: &[u8]) -> Vec<u8> {
    let position = records(image)
        .into_iter()
        .find(|at| image[at + 4] == kind)
        .unwrap();
    let old = u32::from_le_bytes(image[position + 60..position + 64].try_into().unwrap());
    let start = position + 128;
    let mut changed = image[..start].to_vec();
    put(&mut changed, position + 56, payload.len() as u64, 4);
    put(&mut changed, position + 60, payload.len() as u64, 4);
    put(&mut changed, position + 64, 0, 4);
    changed.extend(payload);
    changed.resize(changed.len().next_multiple_of(8), 0);
    let pad = u32::from_le_bytes(image[position + 64..position + 68].try_into().unwrap());
    changed.extend(&image[start + pad as usize + (old as usize).next_multiple_of(8)..]);
    reseal(&mut changed);
    changed
}

/// Runs the program and measures how much memory it took at most, in KiB.
fn peak_of(args: &[&Path]) -> u64 {
    let script = "import resource, subprocess, sys\n\
        subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n\
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)";
    let program = Path::new(env!("CARGO_BIN_EXE_holdstill"));
    let args: Vec<&Path> = [Path::new("-c"), Path::new(script), program]
        .into_iter()
        .chain(args.iter().copied())
        .collect();
    let done = output("python3", args);
    String::from_utf8(done.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap()
}

/// What images declare costs no memory; what they hold costs little.
#[test]
fn memory_is_bounded_whatever_an_image_says() {
    let dir = temp_dir();
    let plain = golden("plain");
    let mut bombs: Vec<(&str, Vec<u8>)> = Vec::new();
    // JSON: deep, wide, long.
    let json = |text: String| with_payload(&plain, 1, text.as_bytes());
    let volumes = |text: &str| format!("{{\"tool\":\"\",\"volumes\":[{text}]}}");
    bombs.push(("deep", json("[".repeat(4 << 20))));
    bombs.push(("wide", json(volumes(&vec!["{}"; 1 << 20].join(",")))));
    bombs.push((
        "strings",
        json(format!("{{\"x\":[{}]}}", vec!["\"\""; 1 << 20].join(","))),
    ));
    bombs.push(("too long", json(" ".repeat(5 << 20))));
    let ranges = vec!["[0,0]"; 600_000].join(",");
    let trailer = format!(
        "{{\"grade\":\"clean\",\"freeze\":\"\",\"instant\":\"\",\"freeze_ms\":0,\"freezes\":[],\
         \"warnings\":[],\"volumes\":[{{\"n\":1,\"grade\":\"clean\",\"instant\":\"\",\
         \"used_bytes\":0,\"unreadable\":[{ranges}]}}]}}"
    );
    bombs.push(("ranges", with_payload(&plain, 5, trailer.as_bytes())));
    // The largest lengths and counts, with nothing behind them.
    for (name, at, value) in [
        ("plain", 56, 8 << 20),
        ("stored", 60, u32::MAX),
        ("extents", 48, 8192),
        ("hashes", 52, 2048),
        ("all extents", 48, u32::MAX),
    ] {
        let mut image = plain.clone();
        put(&mut image, 72, 8 << 20, 4);
        let data = records(&image)[1];
        put(&mut image, data + at, value.into(), 4);
        reseal(&mut image);
        bombs.push((name, image));
    }
    let path = dir.path().join("bomb");
    for (name, image) in &bombs {
        std::fs::write(&path, image).unwrap();
        let verify = [Path::new("verify"), &path];
        if *name != "ranges" {
            run(verify).expect(4);
        }
        let peak = peak_of(&verify);
        assert!(peak < 128 << 10, "{name}: {peak} KiB");
        let target = dir.path().join("target");
        let salvage = ["restore", "--salvage"].map(PathBuf::from);
        let salvage: Vec<&Path> = salvage.iter().map(PathBuf::as_path).collect();
        let peak = peak_of(&[salvage.as_slice(), &[&path, &target]].concat());
        assert!(peak < 128 << 10, "{name}, salvaged: {peak} KiB");
        let _ = std::fs::remove_file(&target);
    }
}
