//! The map of ext2, ext3 and ext4 against the tools that make and check them.

use holdstill::fs::{self, Condition, Filesystem, Opened};
use holdstill::read_at::ReadAt;

use crate::common::{FileSource, run, sparse_file, temp_dir};

fn known(source: &dyn ReadAt) -> Box<dyn Filesystem> {
    match fs::open(source).expect("opens") {
        Opened::Known(filesystem) => filesystem,
        other => panic!("no map: {other:?}"),
    }
}

#[test]
fn the_map_counts_what_the_superblock_counts() {
    let dir = temp_dir();
    let image = dir.path().join("image");
    sparse_file(&image, 512 << 20);
    let path = image.to_str().unwrap();
    run("mkfs.ext4", ["-q", "-d", "/usr/include", path]);
    let source = FileSource::open(&image);
    let filesystem = known(&source);
    assert_eq!(filesystem.condition(), Condition::Clean);
    let walk = filesystem.walk_used(&source, &mut |_| Ok(())).unwrap();
    assert_eq!(walk.warnings, [""; 0]);
    let text = run("dumpe2fs", ["-h", path]);
    let number = |name: &str| -> u64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().parse().unwrap()
    };
    let used = number("Block count:") - number("Free blocks:");
    assert_eq!(walk.used.0, used * number("Block size:"));
}
