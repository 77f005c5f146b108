//! What the targets of device-mapper's tables say of where their data lie
//! (Documentation/admin-guide/device-mapper). Tables come from the kernel, and are checked all the same:
//! a target or an option that is not known here is refused.

use super::{Makeup, Piece};
use crate::dm::{Table, Target};
use crate::node::DeviceNumber;
use crate::stack::Stripe;

/// Most columns of a stripe, and members of a mirror.
const MOST_COLUMNS: u64 = 128;

/// Options of `crypt` that change neither place nor end of a write.
const CRYPT_OPTIONS: [&str; 7] = [
    "allow_discards",
    "same_cpu_crypt",
    "submit_from_crypt_cpus",
    "no_read_workqueue",
    "no_write_workqueue",
    "iv_large_sectors",
    "high_priority",
];

/// How the device with this table is made. `status` is what its targets say of their state, needed
/// only for [`needs_status`].
///
/// # Errors
/// What of it is in the way.
pub(super) fn makeup(table: &Table, status: Option<&Table>) -> Result<Makeup, String> {
    if table.is_suspended {
        return Err("it is suspended".to_owned());
    }
    let mut end = 0;
    for target in &table.targets {
        if target.start != end || target.sectors == 0 {
            return Err("there are gaps in its table".to_owned());
        }
        end = target.start.saturating_add(target.sectors);
    }
    match table.targets.as_slice() {
        [] => Err("it has no table".to_owned()),
        [only] if only.kind == "crypt" => crypt(only).map(|piece| Makeup::Joined(vec![piece])),
        [only] if only.kind == "snapshot-origin" => {
            let lower = params(only, 1)?;
            Ok(Makeup::Joined(vec![piece(only, lower[0], "0")?]))
        }
        [only] if only.kind == "raid" => mirror(only, status).map(Makeup::Mirrored),
        many => {
            let mut pieces = Vec::new();
            for target in many {
                pieces.extend(joined(target)?);
            }
            Ok(Makeup::Joined(pieces))
        }
    }
}

/// Whether the table alone does not tell all.
pub(super) fn needs_status(table: &Table) -> bool {
    table.targets.iter().any(|target| target.kind == "raid")
}

fn joined(target: &Target) -> Result<Vec<Piece>, String> {
    match target.kind.as_str() {
        "linear" => {
            let words = params(target, 2)?;
            Ok(vec![piece(target, words[0], words[1])?])
        }
        "delay" => delay(target).map(|piece| vec![piece]),
        "striped" => striped(target),
        "crypt" | "snapshot-origin" | "raid" => Err(format!(
            "its target `{}` is one of several, which is not known to be safe",
            target.kind
        )),
        other => Err(format!(
            "writes cannot be followed through its target `{other}`"
        )),
    }
}

/// `cipher key iv_offset device start [count option...]`.
fn crypt(target: &Target) -> Result<Piece, String> {
    let words = words(target);
    let options = match words.get(5) {
        None => &[],
        Some(count) => {
            let options = words.get(6..).unwrap_or_default();
            if number(target, count)? != options.len() as u64 {
                return Err(nonsense(target));
            }
            options
        }
    };
    for option in options {
        if option.starts_with("integrity:") {
            return Err("it is encrypted with integrity: writes end in a journal first".to_owned());
        }
        let sector_size = option.strip_prefix("sector_size:");
        if !CRYPT_OPTIONS.contains(option) && sector_size.is_none_or(|n| n.parse::<u32>().is_err())
        {
            return Err(format!("its option `{option}` of `crypt` is not known"));
        }
    }
    let [_, _, iv_offset, device, start, ..] = words.as_slice() else {
        return Err(nonsense(target));
    };
    number(target, iv_offset)?;
    piece(target, device, start)
}

/// `device start ms`, once, or for reads, writes and flushes.
fn delay(target: &Target) -> Result<Piece, String> {
    let words = words(target);
    let (places, rest) = words.as_chunks::<3>();
    let [first, others @ ..] = places else {
        return Err(nonsense(target));
    };
    if !rest.is_empty() || places.len() > 3 {
        return Err(nonsense(target));
    }
    for [device, start, delay] in places {
        number(target, delay)?;
        piece(target, device, start)?;
    }
    let [device, start, _] = first;
    if others.iter().any(|[d, s, _]| (d, s) != (device, start)) {
        return Err("its target `delay` reads in one place and writes in another".to_owned());
    }
    piece(target, device, start)
}

/// `columns chunk (device start)...`.
fn striped(target: &Target) -> Result<Vec<Piece>, String> {
    let words = words(target);
    let [columns, chunk, places @ ..] = words.as_slice() else {
        return Err(nonsense(target));
    };
    let (columns, chunk) = (number(target, columns)?, number(target, chunk)?);
    let (places, rest) = places.as_chunks::<2>();
    if columns == 0
        || chunk == 0
        || columns > MOST_COLUMNS
        || places.len() as u64 != columns
        || !rest.is_empty()
        || !target.sectors.is_multiple_of(columns)
        || !(target.sectors / columns).is_multiple_of(chunk)
    {
        return Err(nonsense(target));
    }
    let column = |(column, [device, start]): (usize, &[&str; 2])| {
        Ok(Piece {
            sectors: target.sectors / columns,
            stripe: Some(Stripe {
                chunk,
                columns,
                column: column as u64,
            }),
            ..piece(target, device, start)?
        })
    };
    places.iter().enumerate().map(column).collect()
}

/// `raid1 count param... count (metadata data)...`.
fn mirror(target: &Target, status: Option<&Table>) -> Result<Vec<Piece>, String> {
    let words = words(target);
    let [level, count, rest @ ..] = words.as_slice() else {
        return Err(nonsense(target));
    };
    if *level != "raid1" {
        return Err(format!(
            "writes cannot be followed through its target `raid` of level {level}"
        ));
    }
    let count = usize::try_from(number(target, count)?).map_err(|_| nonsense(target))?;
    let (Some(options), Some([disks, places @ ..])) = (rest.get(..count), rest.get(count..)) else {
        return Err(nonsense(target));
    };
    // The first is the size of chunks, which a mirror has none of.
    let mut options = options.iter().skip(1);
    while let Some(&option) = options.next() {
        match option {
            "sync" | "nosync" => {}
            "region_size" | "daemon_sleep" | "min_recovery_rate" | "max_recovery_rate" => {
                number(target, options.next().copied().unwrap_or_default())?;
            }
            other => {
                return Err(format!(
                    "writes cannot be followed through its target `raid` with {other}"
                ));
            }
        }
    }
    let disks = number(target, disks)?;
    let (places, rest) = places.as_chunks::<2>();
    if !(2..=MOST_COLUMNS).contains(&disks) || places.len() as u64 != disks || !rest.is_empty() {
        return Err(nonsense(target));
    }
    whole_mirror(disks, status)?;
    let members = places.iter();
    members.map(|[_, data]| piece(target, data, "0")).collect()
}

/// `raid1 disks health in_sync/all action mismatches [data_offset [journal]]`.
fn whole_mirror(disks: u64, status: Option<&Table>) -> Result<(), String> {
    let state = match status.map(|status| status.targets.as_slice()) {
        Some([only]) if only.kind == "raid" => only.params.as_str(),
        _ => return Err("it does not tell its state".to_owned()),
    };
    let whole = "A".repeat(usize::try_from(disks).unwrap_or_default());
    let words: Vec<&str> = state.split_ascii_whitespace().collect();
    let is_whole = match words.as_slice() {
        [
            "raid1",
            count,
            health,
            ratio,
            "idle",
            _mismatches,
            rest @ ..,
        ] => {
            let complete = ratio.split_once('/').is_some_and(|(now, all)| now == all);
            *count == disks.to_string()
                && *health == whole
                && complete
                && matches!(rest, [] | ["0"] | ["0", "-"])
        }
        _ => false,
    };
    match is_whole {
        true => Ok(()),
        false => Err(format!(
            "it is degraded or not in sync (its state is `{state}`)"
        )),
    }
}

fn words(target: &Target) -> Vec<&str> {
    target.params.split_ascii_whitespace().collect()
}

/// Exactly so many parameters.
fn params(target: &Target, count: usize) -> Result<Vec<&str>, String> {
    let words = words(target);
    match words.len() == count {
        true => Ok(words),
        false => Err(nonsense(target)),
    }
}

fn number(target: &Target, word: &str) -> Result<u64, String> {
    word.parse().map_err(|_| nonsense(target))
}

/// All of the target, at this place.
fn piece(target: &Target, device: &str, start: &str) -> Result<Piece, String> {
    let lower: DeviceNumber = device.parse().map_err(|_| nonsense(target))?;
    Ok(Piece {
        start: target.start,
        sectors: target.sectors,
        lower,
        lower_start: number(target, start)?,
        stripe: None,
    })
}

fn nonsense(target: &Target) -> String {
    format!(
        "the parameters of its target `{}` are not understood",
        target.kind
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn table(targets: &[(u64, &str, &str)]) -> Table {
        let mut start = 0;
        let targets = targets.iter().map(|(sectors, kind, params)| {
            let target = Target {
                start,
                sectors: *sectors,
                kind: (*kind).to_owned(),
                params: (*params).to_owned(),
            };
            start += sectors;
            target
        });
        Table {
            targets: targets.collect(),
            is_suspended: false,
        }
    }

    fn status(text: &str) -> Table {
        table(&[(655_360, "raid", text)])
    }

    /// Start, sectors, lower device and start there of each piece.
    fn pieces(made: Result<Makeup, String>) -> Vec<(u64, u64, String, u64)> {
        match made.unwrap() {
            Makeup::Leaf => panic!("no leaf"),
            Makeup::Joined(pieces) | Makeup::Mirrored(pieces) => pieces
                .into_iter()
                .map(|p| (p.start, p.sectors, p.lower.to_string(), p.lower_start))
                .collect(),
        }
    }

    fn one(kind: &str, params: &str) -> Result<Makeup, String> {
        makeup(&table(&[(655_360, kind, params)]), None)
    }

    fn refused(made: Result<Makeup, String>, words: &str) {
        let why = made.unwrap_err();
        assert!(why.contains(words), "{why}");
    }

    #[test]
    fn tables_as_the_kernel_shows_them() {
        let segments = table(&[
            (204_800, "linear", "253:0 2048"),
            (450_560, "linear", "253:1 2048"),
        ]);
        assert_eq!(
            pieces(makeup(&segments, None)),
            [
                (0, 204_800, "253:0".to_owned(), 2048),
                (204_800, 450_560, "253:1".to_owned(), 2048)
            ]
        );
        let whole = |lower: &str, start| vec![(0, 655_360, lower.to_owned(), start)];
        for params in [
            // cryptsetup open of LUKS2; of LUKS1 (the key is left out in dm); with options; plain.
            "aes-xts-plain64 :64:logon:cryptsetup:1b2f-d0 0 254:17 32768",
            "aes-xts-plain64 - 0 254:17 32768",
            "aes-xts-plain64 - 0 254:17 32768 1 allow_discards",
            "capi:xts(aes)-plain64 - 8 254:17 32768 4 no_read_workqueue no_write_workqueue sector_size:4096 iv_large_sectors",
        ] {
            assert_eq!(pieces(one("crypt", params)), whole("254:17", 32768));
        }
        for params in [
            "254:16 8 30",
            "254:16 8 0 254:16 8 30",
            "254:16 8 0 254:16 8 30 254:16 8 1",
        ] {
            assert_eq!(pieces(one("delay", params)), whole("254:16", 8));
        }
        assert_eq!(pieces(one("snapshot-origin", "253:5")), whole("253:5", 0));
        let Ok(Makeup::Joined(columns)) = one("striped", "2 128 254:16 2048 254:32 0 ") else {
            panic!("not striped");
        };
        assert_eq!(columns.len(), 2);
        assert_eq!(columns[1].sectors, 327_680);
        let stripe = Stripe {
            chunk: 128,
            columns: 2,
            column: 1,
        };
        assert_eq!(columns[1].stripe, Some(stripe));
    }

    #[test]
    fn a_mirror_must_be_whole() {
        let params = "raid1 3 0 region_size 4096 2 253:0 253:1 253:2 253:3";
        let mirror = table(&[(655_360, "raid", params)]);
        assert!(needs_status(&mirror));
        let made = makeup(
            &mirror,
            Some(&status("raid1 2 AA 655360/655360 idle 0 0 -")),
        );
        assert!(matches!(made, Ok(Makeup::Mirrored(_))));
        assert_eq!(
            pieces(made),
            [
                (0, 655_360, "253:1".to_owned(), 0),
                (0, 655_360, "253:3".to_owned(), 0)
            ]
        );
        for bad in [
            "raid1 2 AD 655360/655360 idle 0 0 -",
            "raid1 2 Aa 655360/655360 idle 0 0 -",
            "raid1 2 AA 4096/655360 resync 0 0 -",
            "raid1 2 AA 655360/655360 check 0 0 -",
            "raid1 2 AA 655360/655360 idle 0 8 -",
            "raid1 2 AA 655360/655360 idle 0 0 A",
            "raid1 3 AAA 655360/655360 idle 0 0 -",
            "",
        ] {
            refused(makeup(&mirror, Some(&status(bad))), "degraded");
        }
        refused(makeup(&mirror, None), "state");
        for (params, words) in [
            (
                "raid1 5 0 region_size 4096 write_mostly 1 2 253:0 253:1 253:2 253:3",
                "write_mostly",
            ),
            (
                "raid1 3 0 data_offset 8 2 253:0 253:1 253:2 253:3",
                "data_offset",
            ),
            ("raid1 3 0 rebuild 1 2 253:0 253:1 253:2 253:3", "rebuild"),
            (
                "raid1 3 0 region_size x 2 253:0 253:1 253:2 253:3",
                "not understood",
            ),
            (
                "raid1 9 0 region_size 4096 2 253:0 253:1 253:2 253:3",
                "not understood",
            ),
            (
                "raid1 3 0 region_size 4096 2 253:0 253:1 - -",
                "not understood",
            ),
            (
                "raid1 3 0 region_size 4096 3 253:0 253:1 253:2 253:3",
                "not understood",
            ),
            (
                "raid5_ls 3 128 region_size 4096 3 253:0 253:1 253:2 253:3 253:4 253:5",
                "raid5_ls",
            ),
            ("raid1", "not understood"),
        ] {
            let table = table(&[(655_360, "raid", params)]);
            let state = status("raid1 2 AA 655360/655360 idle 0 0 -");
            refused(makeup(&table, Some(&state)), words);
        }
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        for kind in [
            "writecache",
            "cache",
            "thin",
            "thin-pool",
            "snapshot",
            "snapshot-merge",
            "mirror",
            "integrity",
            "era",
            "clone",
            "zero",
            "error",
            "verity",
            "vdo",
            "multipath",
            "ebs",
        ] {
            refused(one(kind, "254:16 0"), &format!("`{kind}`"));
        }
        refused(
            one(
                "crypt",
                "capi:authenc(hmac(sha256),xts(aes))-random - 0 253:0 0 1 integrity:48:aead",
            ),
            "integrity",
        );
        refused(one("crypt", "aes - 0 254:17 0 1 new_option"), "new_option");
        refused(one("delay", "254:16 0 0 254:32 0 30"), "writes in another");
        let two = table(&[(8, "crypt", "aes - 0 254:17 0"), (8, "linear", "254:17 8")]);
        refused(makeup(&two, None), "one of several");
        let suspended = Table {
            is_suspended: true,
            ..table(&[(8, "linear", "254:17 8")])
        };
        refused(makeup(&suspended, None), "suspended");
        refused(makeup(&table(&[]), None), "no table");
        let mut gap = table(&[(8, "linear", "254:17 8"), (8, "linear", "254:17 16")]);
        gap.targets[1].start = 9;
        refused(makeup(&gap, None), "gaps");
    }

    #[test]
    fn parameters_are_checked() {
        for (kind, params) in [
            ("linear", ""),
            ("linear", "254:16"),
            ("linear", "254:16 x"),
            ("linear", "254:16 0 0"),
            ("linear", "254:16 -1"),
            ("linear", "/dev/vdb 0"),
            ("crypt", "aes - 0 254:17"),
            ("crypt", "aes - 0 32768 254:17"),
            ("crypt", "aes - x 254:17 0"),
            ("crypt", "aes - 0 254:17 0 2 allow_discards"),
            ("crypt", "aes - 0 254:17 0 x allow_discards"),
            ("delay", "254:16 0"),
            ("delay", "254:16 0 x"),
            ("delay", "254:16 0 0 254:16 0"),
            ("striped", "2 128 254:16 0"),
            ("striped", "2 0 254:16 0 254:32 0"),
            ("striped", "0 128"),
            ("striped", "2 127 254:16 0 254:32 0"),
            ("striped", "3 128 254:16 0 254:32 0 254:48 0"),
            ("snapshot-origin", "254:16 0"),
        ] {
            refused(one(kind, params), "not understood");
        }
    }

    /// A word that is a number, a device, or what a target might say.
    fn word() -> impl Strategy<Value = String> {
        prop_oneof![
            (0u64..9).prop_map(|number| number.to_string()),
            any::<u64>().prop_map(|number| number.to_string()),
            (0u32..4).prop_map(|minor| format!("253:{minor}")),
            Just("raid1".to_owned()),
            Just("nosync".to_owned()),
            Just("region_size".to_owned()),
            "[ -~]{0,8}",
        ]
    }

    proptest! {
        /// Whatever a target says: an error at worst, and what is understood lies within the table.
        #[test]
        fn any_parameters(
            kind in prop::sample::select(vec![
                "linear", "striped", "crypt", "delay", "snapshot-origin", "raid",
            ]),
            sectors in prop_oneof![1u64..100, any::<u64>()],
            words in prop::collection::vec(word(), 0..12),
            state in prop::collection::vec(word(), 0..8),
        ) {
            let table = table(&[(sectors, kind, &words.join(" "))]);
            let status = status(&state.join(" "));
            if let Ok(Makeup::Joined(pieces) | Makeup::Mirrored(pieces)) = makeup(&table, Some(&status)) {
                prop_assert!(!pieces.is_empty());
                for piece in pieces {
                    let columns = piece.stripe.map_or(1, |stripe| stripe.columns);
                    prop_assert_eq!(piece.sectors * columns, sectors);
                    prop_assert_eq!(piece.start, 0);
                    if let Some(stripe) = piece.stripe {
                        prop_assert!(stripe.column < columns && piece.sectors % stripe.chunk == 0);
                    }
                }
            }
        }
    }
}
