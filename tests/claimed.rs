//! A target that is in use is refused also where no list of mounts shows it: the kernel is asked for a
//! claim.

use std::fs::{File, OpenOptions};
use std::path::Path;

use crate::common::holdstill::{run, same_bytes};
use crate::common::scene::{SIZE, Scene};
use crate::common::volume::ext4;
use crate::common::{LoopDevice, Mount, Partition, needs_root, output, run as tool, shell};

/// A line of shell that is run at the end, also of a test that failed.
struct AtEnd(String);

impl Drop for AtEnd {
    fn drop(&mut self) {
        output("bash", ["-c", &self.0]);
    }
}

/// A mounted filesystem that is in no list of mounts any more, as long as this file is open.
fn unmounted_lazily(device: &Path, point: &Path) -> File {
    let mount = Mount::new(device, point, "ext4", "");
    let open = File::create(point.join("open")).unwrap();
    tool("umount", [Path::new("--lazy"), point]);
    std::mem::forget(mount);
    open
}

/// Where the file system on a disk of 64 MiB begins.
const PLACES: [u64; 2] = [0, 32 << 20];

#[test]
fn privileged_a_file_below_a_mount_that_is_not_listed_is_refused() {
    needs_root!();
    let scene = Scene::new();
    let file = scene.path("disk");
    for place in PLACES {
        ext4(&file, 64 << 20, "", None);
        let offset = place.to_string();
        let device = LoopDevice::attach_with(&file, &["--offset", &offset]);
        tool("mke2fs", [Path::new("-qF"), device.path()]);
        let open = unmounted_lazily(device.path(), &scene.path("point"));
        scene.refuses(3, "in use", scene.restore_to(&file));
        scene.refuses(3, "in use", {
            let [clone, yes] = ["clone", "--yes"].map(Path::new);
            [clone, yes, scene.source.as_path(), file.as_path()]
        });
        scene.refuses(
            3,
            "somebody has the target",
            scene.restore_to(device.path()),
        );
        drop(open);
    }
    // A partition of the file.
    let device = LoopDevice::attach(&file);
    let partition = Partition::add(device.path(), 1, 2048, 60_000);
    tool("mke2fs", [Path::new("-qF"), partition.node()]);
    let open = unmounted_lazily(partition.node(), &scene.path("point"));
    scene.refuses(3, "in use", scene.restore_to(&file));
    drop(open);
    drop(partition);
    // In use by nobody: a file behind an idle loop device is a target.
    run(scene.restore_to(&file)).expect(0);
}

#[test]
fn privileged_a_file_below_a_mount_in_a_namespace_without_processes_is_refused() {
    needs_root!();
    let scene = Scene::new();
    let file = scene.path("disk");
    ext4(&file, SIZE, "", None);
    let device = LoopDevice::attach(&file);
    let [kept, point] = ["kept", "point"].map(|name| scene.path(name));
    std::fs::create_dir(&point).unwrap();
    let [kept, point] = [&kept, &point].map(|path| path.display().to_string());
    let end = AtEnd(format!("umount {kept}/ns; umount {kept}"));
    shell(format!(
        "mkdir {kept}; mount --bind {kept} {kept}; mount --make-private {kept}; touch {kept}/ns
        unshare --mount={kept}/ns mount {} {point}",
        device.path().display()
    ));
    scene.refuses(3, "in use", scene.restore_to(&file));
    scene.refuses(
        3,
        "somebody has the target",
        scene.restore_to(device.path()),
    );
    drop(end);
}

#[test]
fn privileged_a_file_of_a_layer_that_is_in_use_through_its_overlay_is_refused() {
    needs_root!();
    let scene = Scene::new();
    let dir = scene.dir.path().display().to_string();
    shell(format!("cd {dir}; mkdir lower upper work merged"));
    let [written, read] = ["lower/written", "lower/read"].map(|name| scene.path(name));
    ext4(&written, SIZE, "", None);
    ext4(&read, SIZE, "", None);
    let end = AtEnd(format!("umount {dir}/merged"));
    shell(format!(
        "cd {dir}; mount -t overlay -o lowerdir={dir}/lower,upperdir={dir}/upper,workdir={dir}/work x merged"
    ));
    {
        // A file that is written is copied up first; one that is only read stays in the lower layer.
        let device = LoopDevice::attach(&scene.path("merged/written"));
        let read_only = LoopDevice::attach_with(&scene.path("merged/read"), &["--read-only"]);
        let upper = scene.path("upper/written");
        for (device, file, options) in [(&device, &upper, ""), (&read_only, &read, "ro,noload")] {
            let before = std::fs::read(file).unwrap();
            let mount = Mount::new(device.path(), &scene.path("point"), "ext4", options);
            run(scene.restore_to(file)).expect(3).says("in use");
            drop(mount);
            assert!(options.is_empty() || before == std::fs::read(file).unwrap());
        }
    }
    drop(end);
    let fresh = scene.path("fresh");
    run([Path::new("restore"), &scene.image, &fresh]).expect(0);
}

#[test]
fn a_file_that_others_only_read_is_a_target() {
    let scene = Scene::new();
    let target = scene.target(SIZE);
    let reader = File::open(&target).unwrap();
    run(scene.restore_to(&target)).expect(0);
    assert!(same_bytes(&scene.source, &target) || reader.metadata().unwrap().len() == SIZE);
    drop(reader);
    let writer = OpenOptions::new().write(true).open(&target).unwrap();
    scene.refuses(3, "open for writing", scene.restore_to(&target));
    drop(writer);
}
