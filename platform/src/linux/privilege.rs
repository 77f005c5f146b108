//! The capabilities of this process, by `/proc/self/status` (capabilities(7)).

/// Those that freezing, claiming, mounting and reading devices need, by their numbers.
const NEEDED: [(u32, &str); 5] = [
    (1, "CAP_DAC_OVERRIDE"),
    (2, "CAP_DAC_READ_SEARCH"),
    (17, "CAP_SYS_RAWIO"),
    (19, "CAP_SYS_PTRACE"),
    (21, "CAP_SYS_ADMIN"),
];

pub(crate) fn missing() -> Vec<&'static str> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    missing_in(&status).unwrap_or_default()
}

fn missing_in(status: &str) -> Option<Vec<&'static str>> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    let has = u64::from_str_radix(line.trim(), 16).ok()?;
    let missing = NEEDED.iter().filter(|(bit, _)| has & (1 << bit) == 0);
    Some(missing.map(|(_, name)| *name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        // As Docker gives it by default.
        let docker = "Uid:\t0\t0\t0\t0\nCapEff:\t00000000a80425fb\n";
        let missing = missing_in(docker).unwrap();
        assert!(missing.contains(&"CAP_SYS_ADMIN") && !missing.contains(&"CAP_DAC_OVERRIDE"));
        assert_eq!(missing_in("CapEff:\t000001ffffffffff\n"), Some(vec![]));
        assert_eq!(missing_in("nothing"), None);
    }
}
