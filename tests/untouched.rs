//! What can refuse does so before a target is touched: last night's copy is still there then.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::common::holdstill::run;
use crate::common::scene::{SIZE, Scene};
use crate::common::volume::{copy, ext4};
use crate::common::{LoopDevice, Mount, command as tool_command, needs_root, spawn, temp_dir};

fn clone(source: &Path, target: &Path, options: &[&str]) -> Vec<PathBuf> {
    let args = ["clone", "--yes"].iter().chain(options).map(PathBuf::from);
    args.chain([source.to_owned(), target.to_owned()]).collect()
}

#[test]
fn privileged_a_clone_that_is_refused_leaves_the_last_one() {
    needs_root!();
    let dir = temp_dir();
    let [file, target] = ["volume", "target"].map(|part| dir.path().join(part));
    ext4(&file, SIZE, "", None);
    ext4(&target, SIZE, "-L last", None);
    let before = std::fs::read(&target).unwrap();
    let untouched = |when: &str| assert!(before == std::fs::read(&target).unwrap(), "{when}");
    let device = LoopDevice::attach(&file);
    let mount = Mount::new(device.path(), &dir.path().join("live"), "ext4", "");
    for step in ["track", "hold"] {
        let freeze = ["--freeze", step];
        let hook = [&freeze[..], &["--pre-freeze", "exit 3"]].concat();
        run(clone(mount.dir(), &target, &hook))
            .expect(1)
            .says("pre-freeze");
        untouched("the hook failed");

        let frozen = mount.freeze();
        let refused = run(clone(mount.dir(), &target, &freeze));
        drop(frozen);
        refused.expect(3).says("freeze");
        untouched("frozen by somebody else");
    }
    run(clone(mount.dir(), &target, &[])).expect(0);
    assert!(before != std::fs::read(&target).unwrap());
}

/// Where the pre-freeze hook runs only after the copying, both are tried before an existing target is
/// touched.
#[test]
fn privileged_hooks_are_rehearsed_before_an_existing_target_is_touched() {
    needs_root!();
    let dir = temp_dir();
    let [file, target, log] = ["volume", "target", "log"].map(|part| dir.path().join(part));
    ext4(&file, SIZE, "", None);
    let device = LoopDevice::attach(&file);
    let mount = Mount::new(device.path(), &dir.path().join("live"), "ext4", "");
    // What is at the start of the target is what tells whether it was touched.
    let look = format!(
        "echo $HOLDSTILL_PHASE $(head -c 4096 {} | tr -d '\\0' | wc -c) >> {}",
        target.display(),
        log.display()
    );
    let hooks = [
        "--pre-freeze",
        look.as_str(),
        "--post-freeze",
        look.as_str(),
    ];
    run(clone(mount.dir(), &target, &hooks)).expect(0);
    let logged = || std::mem::take(&mut std::fs::read_to_string(&log).unwrap());
    assert_eq!(logged(), "pre 0\npost 0\n", "a new target");
    std::fs::remove_file(&log).unwrap();
    std::fs::write(&target, vec![0xa5; SIZE as usize]).unwrap();
    run(clone(mount.dir(), &target, &hooks)).expect(0);
    assert_eq!(logged(), "pre 4096\npost 4096\npre 0\npost 0\n");
    std::fs::remove_file(&log).unwrap();
    // Once is enough where they run before.
    drop(mount);
    run(clone(device.path(), &target, &hooks)).expect(0);
    let lines = logged().lines().count();
    assert_eq!(lines, 2);
}

#[test]
fn a_second_target_that_cannot_be_opened_leaves_the_first() {
    let scene = Scene::new();
    let [second, both] = ["second", "both"].map(|name| scene.path(name));
    copy(&scene.source, &second);
    let backup = [Path::new("backup"), &scene.source, &second];
    run(backup.into_iter().chain([Path::new("-o"), &both])).expect(0);
    let target = scene.target(SIZE);
    // A program that runs cannot be written to.
    let program = scene.path("program");
    std::fs::copy("/bin/sleep", &program).unwrap();
    let file = OpenOptions::new().write(true).open(&program).unwrap();
    file.set_len(SIZE).unwrap();
    drop(file);
    let mut running = tool_command(program.to_str().unwrap(), ["600"]);
    let mut running = spawn(running.stdin(Stdio::null()));
    let maps = [(1, &target), (2, &program)].map(|(n, path)| format!("{n}={}", path.display()));
    let args = ["restore", "--yes", both.to_str().unwrap()];
    let args = args
        .into_iter()
        .chain(["--map", &maps[0], "--map", &maps[1]]);
    let before = scene.state();
    let refused = run(args);
    running.kill().unwrap();
    running.wait().unwrap();
    refused.expect(1).says("program");
    assert!(before == scene.state());
}

#[test]
fn an_image_whose_end_is_missing_leaves_the_target() {
    let scene = Scene::new();
    let whole = std::fs::read(&scene.image).unwrap();
    let target = scene.target(SIZE);
    let mut footer = whole.clone();
    let end = footer.len() - 4000;
    footer[end] ^= 1;
    let mut trailing = whole.clone();
    trailing.push(0);
    let bad = scene.path("bad");
    for bytes in [
        &whole[..whole.len() / 2],
        &whole[..whole.len() - 4096],
        &footer,
        &trailing,
    ] {
        std::fs::write(&bad, bytes).unwrap();
        let [restore, yes] = ["restore", "--yes"].map(Path::new);
        scene.refuses(4, "bad", [restore, yes, &bad, &target]);
    }
    // Whoever wants what is left gets it.
    std::fs::write(&bad, &whole[..whole.len() - 4096]).unwrap();
    let salvage = ["restore", "--yes", "--salvage"].map(Path::new).into_iter();
    run(salvage.chain([bad.as_path(), &target])).expect(4);
    assert!(crate::common::holdstill::same_bytes(&scene.source, &target));
}
