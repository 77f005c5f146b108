//! Datasets of ZFS as streams: zfs-send(8) and zfs-receive(8).

use std::collections::BTreeMap;
use std::process::ChildStdin;

use super::{PATIENCE, get, is_name, zfs};
use crate::command::{Output, Streaming, Tool};
use crate::error::{Error, Result};
use crate::stream::Reader;

/// What has to be known of a snapshot to receive its stream elsewhere, and to recognize it there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// `guid` of the snapshot: the same wherever it is received.
    pub guid: String,
    /// About how many bytes its stream has.
    pub size: u64,
    /// The pool.
    pub pool: String,
    /// Its `guid`.
    pub pool_guid: String,
    /// Of the dataset: properties that were set or inherited, and those that say what it is.
    pub properties: BTreeMap<String, String>,
    /// Features of the pool that are active.
    pub features: Vec<String>,
    /// Of the tools and the module.
    pub version: String,
}

/// Properties that say what a dataset is, though nobody has set them.
const TELLING: [&str; 5] = [
    "type",
    "origin",
    "encryption",
    "encryptionroot",
    "keyformat",
];

/// How a snapshot is sent: raw, with large and embedded blocks, compressed as it is on disk.
const SEND: [&str; 5] = ["send", "-w", "-L", "-e", "-c"];

/// Asks for the facts of a snapshot.
///
/// # Errors
/// If a tool fails.
pub fn facts(snapshot: &str) -> Result<Facts> {
    let dataset = snapshot.split('@').next().unwrap_or_default();
    let pool = dataset.split('/').next().unwrap_or_default();
    let properties = get("property,value,source", "all", dataset)?;
    let tool = Tool::find("zpool")?.args(["get", "-H", "-p", "-o", "property,value", "all", pool]);
    let of_pool = tool.deadline(PATIENCE).run().and_then(Output::checked)?;
    let of_pool = String::from_utf8_lossy(&of_pool.stdout).into_owned();
    let estimate = zfs(&[&SEND[..], &["-n", "-P", snapshot]].concat())?;
    Ok(Facts {
        guid: guid(snapshot)?,
        size: value(&estimate, "size")
            .and_then(|size| size.parse().ok())
            .unwrap_or(0),
        pool: pool.to_owned(),
        pool_guid: value(&of_pool, "guid").unwrap_or_default().to_owned(),
        properties: parse_properties(&properties),
        features: active_features(&of_pool),
        version: zfs(&["version"])?.lines().collect::<Vec<_>>().join(", "),
    })
}

/// All snapshots of a recursive one, by their full names: what is above comes before what is below.
///
/// # Errors
/// If the tool fails, or `snapshot` is no snapshot's name.
pub fn with_below(snapshot: &str) -> Result<Vec<String>> {
    let (dataset, name) = snapshot
        .split_once('@')
        .ok_or_else(|| Error::other("cannot use", snapshot, "this is no name of a snapshot"))?;
    let all = zfs(&["list", "-H", "-r", "-t", "snapshot", "-o", "name", dataset])?;
    let mut found: Vec<String> = all
        .lines()
        .filter(|line| line.split_once('@').is_some_and(|(_, found)| found == name))
        .map(str::to_owned)
        .collect();
    found.sort_by(|one, other| path(one).cmp(path(other)));
    Ok(found)
}

/// The parts of a snapshot's dataset: in their order a dataset comes before all that is below it.
fn path(snapshot: &str) -> impl Iterator<Item = &str> {
    snapshot.split('@').next().unwrap_or_default().split('/')
}

/// `guid` of a snapshot.
///
/// # Errors
/// If there is none.
pub fn guid(snapshot: &str) -> Result<String> {
    Ok(get("value", "guid", snapshot)?.trim().to_owned())
}

/// Whether there is a dataset or volume of this name.
///
/// # Errors
/// If the tool is missing, or the name cannot be one.
pub fn exists(name: &str) -> Result<bool> {
    if !is_name(name) {
        return Err(Error::other(
            "cannot use",
            name,
            "this is no name of a dataset",
        ));
    }
    let tool = Tool::find("zfs")?.args(["list", "-H", "-o", "name", name]);
    Ok(tool.deadline(PATIENCE).run()?.success())
}

/// Starts to send a snapshot.
///
/// # Errors
/// If the tool cannot be started.
pub fn send(snapshot: &str) -> Result<(Streaming, Reader)> {
    Tool::find("zfs")?.args(SEND).arg(snapshot).write_stream()
}

/// Starts to receive a stream as this dataset, which stays unmounted.
///
/// # Errors
/// If the tool cannot be started.
pub fn receive(dataset: &str) -> Result<(Streaming, ChildStdin)> {
    Tool::find("zfs")?
        .args(["receive", "-s", "-u", dataset])
        .read_stream()
}

/// Takes back what an interrupted `zfs receive -s` has left.
///
/// # Errors
/// If there is nothing, or the tool fails.
pub fn abort_receive(dataset: &str) -> Result<()> {
    zfs(&["receive", "-A", dataset]).map(drop)
}

/// Gives a dataset or volume another name, in the same pool. What is not mounted stays so.
///
/// # Errors
/// If the tool fails.
pub fn rename(dataset: &str, to: &str) -> Result<()> {
    // The option is for what can be mounted, and refused for the rest.
    let option: &[&str] = match get("value", "type", dataset)?.trim() {
        "filesystem" => &["-u"],
        _ => &[],
    };
    zfs(&[&["rename"], option, &[dataset, to]].concat()).map(drop)
}

/// Destroys a dataset with its snapshots; whatever is below it or cloned from it keeps it.
///
/// # Errors
/// If the tool fails.
pub fn destroy(dataset: &str) -> Result<()> {
    for snapshot in zfs(&[
        "list", "-H", "-d", "1", "-t", "snapshot", "-o", "name", dataset,
    ])?
    .lines()
    {
        zfs(&["destroy", snapshot])?;
    }
    zfs(&["destroy", dataset]).map(drop)
}

/// The value in a line `NAME<tab>VALUE`.
fn value<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let lines = text.lines().filter_map(|line| line.split_once('\t'));
    lines
        .filter(|(found, _)| *found == name)
        .map(|(_, value)| value)
        .next()
}

fn parse_properties(text: &str) -> BTreeMap<String, String> {
    let mut properties = BTreeMap::new();
    for line in text.lines() {
        let mut fields = line.split('\t');
        let (Some(name), Some(value), Some(source)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        if !matches!(source, "default" | "-") || (TELLING.contains(&name) && value != "-") {
            properties.insert(name.to_owned(), value.to_owned());
        }
    }
    properties
}

fn active_features(text: &str) -> Vec<String> {
    let lines = text.lines().filter_map(|line| line.split_once('\t'));
    lines
        .filter(|(_, value)| *value == "active")
        .filter_map(|(name, _)| name.strip_prefix("feature@"))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_above_comes_first() {
        let mut names = ["t/a-b@s", "t/a/c@s", "t@s", "t/a@s", "t/a/b@s", "t/a b@s"];
        names.sort_by(|one, other| path(one).cmp(path(other)));
        let expected = ["t@s", "t/a@s", "t/a/b@s", "t/a/c@s", "t/a b@s", "t/a-b@s"];
        assert_eq!(names, expected);
    }

    #[test]
    fn properties_and_features_are_read() {
        let text = "type\tfilesystem\t-\ncreation\t1\t-\ncompression\tlz4\tlocal\n\
                    atime\ton\tdefault\norigin\ttank/a@s\t-\nkeyformat\tnone\tdefault\n\
                    mountpoint\t/a b\tinherited from tank\nx\n";
        let properties = parse_properties(text);
        let expected = [
            ("compression", "lz4"),
            ("keyformat", "none"),
            ("mountpoint", "/a b"),
            ("origin", "tank/a@s"),
            ("type", "filesystem"),
        ];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(properties, BTreeMap::from(expected));
        let text = "guid\t42\nfeature@lz4_compress\tactive\nfeature@x\tenabled\nsize\tactive\n";
        assert_eq!(active_features(text), ["lz4_compress"]);
        assert_eq!(value(text, "guid"), Some("42"));
    }
}
