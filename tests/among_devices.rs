//! A device name that was mistyped is no name of a file: nothing is made where device nodes belong.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::common::holdstill::run;
use crate::common::scene::{Scene, backup_to};
use crate::common::{Mount, needs_root};

#[test]
fn a_mistyped_device_is_refused_by_every_way_to_it() {
    let scene = Scene::new();
    let mistyped = PathBuf::from(format!("/dev/holdstill-mistyped-{}", std::process::id()));
    let [link, folder] = ["link", "folder"].map(|name| scene.path(name));
    symlink(&mistyped, &link).unwrap();
    symlink("/dev", &folder).unwrap();
    let by_folder = folder.join(mistyped.file_name().unwrap());
    for path in [&mistyped, &link, &by_folder] {
        scene.refuses(3, "no such device", scene.restore_to(path));
        scene.refuses(3, "no such device", backup_to(&scene.source, path));
        let dry = ["restore", "--dry-run"].map(Path::new).into_iter();
        scene.refuses(
            3,
            "no such device",
            dry.chain([scene.image.as_path(), path]),
        );
        let clone = [Path::new("clone"), &scene.source, path];
        scene.refuses(3, "no such device", clone);
        run([
            Path::new("backup"),
            path,
            Path::new("-o"),
            &scene.path("out"),
        ])
        .expect(1);
    }
    assert!(!mistyped.exists());
    // The scene itself is in /dev/shm, where there is one.
    let fresh = scene.path("fresh");
    run([Path::new("restore"), &scene.image, &fresh]).expect(0);
}

#[test]
fn privileged_a_devtmpfs_elsewhere_takes_no_files_either() {
    needs_root!();
    let scene = Scene::new();
    let nodes = Mount::new(Path::new("none"), &scene.path("nodes"), "devtmpfs", "");
    let path = nodes.dir().join("holdstill-mistyped");
    run(scene.restore_to(&path))
        .expect(3)
        .says("no such device");
    run(backup_to(&scene.source, &path))
        .expect(3)
        .says("no such device");
    assert!(!path.exists());
}
