//! The shared helpers themselves.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use holdstill::read_at::ReadAt;
use holdstill::units::{ByteLen, Offset};

use crate::common::{
    FileSource, LoopDevice, Mount, needs_root, run, shell, sparse_file, spawn, temp_dir,
};

#[test]
fn privileged_a_loop_device_mounts_freezes_and_goes_away() {
    needs_root!();
    let dir = temp_dir();
    let image = dir.path().join("image");
    sparse_file(&image, 16 << 20);
    run("mkfs.ext4", ["-q", image.to_str().unwrap()]);
    let device = LoopDevice::attach(&image);
    let node = device.path().to_owned();
    let attached = || run("losetup", ["--list", "--noheadings", "--output", "NAME"]);
    assert!(
        attached()
            .lines()
            .any(|line| line == node.to_str().unwrap())
    );
    {
        let mount = Mount::new(&node, &dir.path().join("mnt"), "ext4", "");
        std::fs::write(mount.dir().join("file"), "content").unwrap();
        drop(mount.freeze());
        std::fs::write(mount.dir().join("file"), "thawed").unwrap();
    }
    assert_eq!(FileSource::open(&node).len(), ByteLen(16 << 20));
    drop(device);
    assert!(
        !attached()
            .lines()
            .any(|line| line == node.to_str().unwrap())
    );
}

#[test]
fn a_file_is_read_where_asked() {
    let dir = temp_dir();
    let path = dir.path().join("file");
    let file = sparse_file(&path, 4096);
    file.write_all_at(b"here", 1000).unwrap();
    let source = FileSource::open(&path);
    let bytes = source.read_vec_at(Offset(999), ByteLen(5)).unwrap();
    assert_eq!(bytes, b"\0here");
    assert!(source.read_vec_at(Offset(4095), ByteLen(2)).is_err());
}

#[test]
fn a_test_that_does_not_end_is_named_and_ended_with_what_it_started() {
    let dir = temp_dir();
    let pid = dir.path().join("pid");
    let mut hanging = Command::new(std::env::current_exe().unwrap());
    hanging.args(["--exact", "harness::hangs", "--ignored"]);
    hanging.envs([
        ("HOLDSTILL_TEST_LIMIT", "2".as_ref()),
        ("PID", pid.as_os_str()),
    ]);
    hanging.stdout(Stdio::piped()).stderr(Stdio::piped());
    let ended = spawn(&mut hanging).wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(101), "{said}");
    assert!(
        said.contains("harness::hangs has not ended within 2 s"),
        "{said}"
    );
    // Its grandchild.
    let grandchild = std::fs::read_to_string(&pid).unwrap();
    let is_gone = || {
        !Path::new("/proc")
            .join(grandchild.trim())
            .join("exe")
            .exists()
    };
    assert!(is_gone(), "{grandchild} is still there");
}

#[test]
#[ignore = "hangs: for the test above"]
fn hangs() {
    shell("sleep 10000 & echo $! >$PID; wait");
}
