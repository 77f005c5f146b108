//! Files that are open but have no name any more: what a freeze finds of them is on no folder's
//! list, only on the filesystem's list of orphans.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::content::{fill, mix};
use crate::run::Task;

/// Files held open at a time.
const HELD: usize = 16;

/// Makes the folder.
pub(crate) fn prepare(task: &Task) -> io::Result<()> {
    std::fs::create_dir(&task.path)
}

/// Makes nameless files, writes to them and lets them go, until it is told to stop.
pub(crate) fn run(task: &Task) -> io::Result<()> {
    let mut held = VecDeque::new();
    let mut bytes = vec![0; 100_000];
    let mut round = 0;
    while !task.stopped() {
        let path = task.path.join("orphan");
        let file = File::create_new(&path)?;
        std::fs::remove_file(&path)?;
        held.push_back(file);
        for file in &held {
            fill(&mut bytes, mix(task.config.seed, !1, round));
            let len = 1 + mix(task.config.seed, !2, round) as usize % bytes.len();
            file.write_all_at(&bytes[..len], 0)?;
            round += 1;
        }
        if held.len() > HELD {
            held.pop_front();
        }
        if round % 64 == 0
            && let Some(file) = held.front()
        {
            file.sync_all()?;
        }
        task.pause();
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Ok(())
}
