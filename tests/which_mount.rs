//! Which filesystem is meant: a device and its mount points are compared, for another mount may cover
//! one.

use std::path::{Path, PathBuf};

use crate::common::holdstill::run;
use crate::common::volume::{digests, populate};
use crate::common::{self, LoopDevice, Mount, Rng, needs_root, sparse_file};

const SIZE: u64 = 64 << 20;

/// A device with an ext4 that has content of its own.
struct Volume {
    device: LoopDevice,
    dir: PathBuf,
}

impl Volume {
    fn new(dir: &Path, name: &str, seed: u64) -> Self {
        let file = dir.join(name);
        sparse_file(&file, SIZE);
        let device = LoopDevice::attach(&file);
        common::run("mkfs.ext4", ["-q", device.path().to_str().unwrap()]);
        let volume = Self {
            device,
            dir: dir.to_owned(),
        };
        let mounted = volume.mount("filling");
        populate(mounted.dir(), &mut Rng(seed), 4 << 20);
        drop(mounted);
        volume
    }

    fn mount(&self, point: &str) -> Mount {
        Mount::new(self.device.path(), &self.dir.join(point), "ext4", "rw")
    }
}

/// What lies in a copy of a volume.
fn content(image: &Path, dir: &Path) -> Vec<(PathBuf, String)> {
    let copy = dir.join("copy");
    let _ = std::fs::remove_file(&copy);
    run(["restore".as_ref(), image.as_os_str(), copy.as_os_str()]).expect(0);
    let device = LoopDevice::attach(&copy);
    let mounted = Mount::new(device.path(), &dir.join("look"), "ext4", "ro");
    digests(mounted.dir()).into_iter().collect()
}

#[test]
fn privileged_a_covered_mount_is_never_taken_for_the_one_above() {
    needs_root!();
    let dir = common::temp_dir();
    let (one, other) = (
        Volume::new(dir.path(), "one", 1),
        Volume::new(dir.path(), "other", 2),
    );
    let image = dir.path().join("image");
    let covered = one.mount("m");
    let expected: Vec<_> = digests(covered.dir()).into_iter().collect();
    let above = other.mount("m");
    let backup = |options: &[&str]| {
        let mut args = vec![
            "backup",
            one.device.path().to_str().unwrap(),
            "-o",
            image.to_str().unwrap(),
            "--json",
        ];
        args.extend(options);
        run(args)
    };
    for options in [
        &[][..],
        &["--all-blocks"],
        &["--freeze", "hold"],
        &["--freeze", "track"],
    ] {
        let refused = backup(options).expect(3).last();
        assert!(
            refused["message"]
                .as_str()
                .unwrap()
                .contains("covered by another mount"),
            "{refused}"
        );
        assert!(!image.exists());
    }
    // What is named by the mount point is the one above.
    let point = dir.path().join("m");
    let result = run([
        "backup",
        point.to_str().unwrap(),
        "-o",
        image.to_str().unwrap(),
        "--json",
    ]);
    assert_eq!(
        result.expect(0).last()["volumes"][0]["path"],
        other.device.path().to_str().unwrap()
    );
    std::fs::remove_file(&image).unwrap();

    // Another place where it is mounted is taken, though it was mounted later.
    let elsewhere = one.mount("elsewhere");
    for step in ["track", "hold"] {
        let result = backup(&["--freeze", step]).expect(0).last();
        assert_eq!(result["grade"], "frozen", "{step}");
        assert_eq!(content(&image, dir.path()), expected, "{step}");
        std::fs::remove_file(&image).unwrap();
    }
    drop(elsewhere);
    drop(above);

    // Covered from a folder above.
    let folder = dir.path().join("a");
    let deep = one.mount("a/deep");
    drop(covered);
    let above = Mount::new(other.device.path(), &folder, "ext4", "rw");
    backup(&[]).expect(3);
    drop(above);
    assert_eq!(backup(&[]).expect(0).last()["grade"], "frozen");
    drop(deep);
}

#[test]
fn privileged_a_folder_that_is_mounted_leads_to_its_filesystem() {
    needs_root!();
    let dir = common::temp_dir();
    let volume = Volume::new(dir.path(), "one", 3);
    let image = dir.path().join("image");
    let mounted = volume.mount("m");
    std::fs::create_dir(mounted.dir().join("folder")).unwrap();
    std::fs::write(mounted.dir().join("folder/file"), "x").unwrap();
    let expected: Vec<_> = digests(mounted.dir()).into_iter().collect();
    let bound = dir.path().join("bound");
    std::fs::create_dir(&bound).unwrap();
    let source = mounted.dir().join("folder");
    common::run(
        "mount",
        ["--bind", source.to_str().unwrap(), bound.to_str().unwrap()],
    );
    let bound = Mount::of(&bound);
    drop(mounted);
    // The folder is not the filesystem; the device is named by the refusal.
    let device = volume.device.path().to_str().unwrap();
    let refused = run([
        "backup",
        bound.dir().to_str().unwrap(),
        "-o",
        image.to_str().unwrap(),
    ])
    .expect(2);
    refused.says(device);
    let result = run(["backup", device, "-o", image.to_str().unwrap(), "--json"])
        .expect(0)
        .last();
    assert_eq!(result["freeze"], "track");
    assert_eq!(result["grade"], "frozen");
    assert_eq!(content(&image, dir.path()), expected);
}

/// A FUSE filesystem whose server never answers, mounted where others look for mounts.
struct Hung {
    // Gone first: then nobody waits for it any more.
    _server: std::fs::File,
    _mount: Mount,
}

impl Hung {
    fn mount(point: &Path, source: &str) -> Self {
        use std::os::fd::AsRawFd;
        std::fs::create_dir_all(point).unwrap();
        let server = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            server.as_raw_fd()
        );
        nix::mount::mount(
            Some(source),
            point,
            Some("fuse"),
            nix::mount::MsFlags::empty(),
            Some(options.as_str()),
        )
        .unwrap();
        Self {
            _server: server,
            _mount: Mount::of(point),
        }
    }
}

#[test]
fn privileged_a_mount_whose_server_is_gone_is_not_touched() {
    needs_root!();
    let dir = common::temp_dir();
    let volume = Volume::new(dir.path(), "one", 4);
    let mounted = volume.mount("m");
    let image = dir.path().join("image");
    // Its source lies on itself, so whoever looks that up waits for ever.
    let point = dir.path().join("hung");
    let hung = Hung::mount(&point, point.join("source").to_str().unwrap());
    let device = volume.device.path().to_str().unwrap();
    for step in ["track", "hold"] {
        run([
            "backup",
            device,
            "--freeze",
            step,
            "--force",
            "-o",
            image.to_str().unwrap(),
        ])
        .expect(0);
    }
    run(["inspect", device]).expect(0);
    drop(mounted);
    run([
        "backup",
        device,
        "--freeze",
        "offline",
        "--force",
        "-o",
        image.to_str().unwrap(),
    ])
    .expect(0);
    let target = dir.path().join("target");
    run(["clone", device, target.to_str().unwrap()]).expect(0);
    run([
        "restore",
        image.to_str().unwrap(),
        target.to_str().unwrap(),
        "--yes",
    ])
    .expect(0);
    run(["cleanup"]).expect(0);
    drop(hung);
}
