//! The shared helpers themselves.

use std::os::unix::fs::FileExt;

use holdstill::read_at::ReadAt;
use holdstill::units::{ByteLen, Offset};

use crate::common::{FileSource, LoopDevice, Mount, needs_root, run, sparse_file, temp_dir};

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
