//! What Mac this is: how new its system is, where its keys are, and whether its disks are kept from root.

use std::fmt;

use super::System;
use super::plist::{dicts, parse};
use crate::error::{Error, Result};

/// The version of macOS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 10 to Catalina, 11 Big Sur, …
    pub major: u32,
    /// Of 10.15, the 15.
    pub minor: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl System {
    /// How new this macOS is.
    ///
    /// # Errors
    /// If the tool is missing, fails, or says no version.
    pub fn version(&self) -> Result<Version> {
        let said = self.ask_text("sw_vers", &["-productVersion"])?;
        parse_version(&said)
            .ok_or_else(|| Error::invalid("cannot understand", "sw_vers", said.trim()))
    }

    /// Whether the keys of internal storage never leave this very machine: it is made with Apple silicon,
    /// or has a T2 (Apple Platform Security: volumes on internal storage are encrypted with a key wrapped
    /// by that of the hardware, with FileVault or without).
    ///
    /// # Errors
    /// If that cannot be found out.
    pub fn has_keys_in_hardware(&self) -> Result<bool> {
        // An Intel Mac may not know the name, and the tool fails then.
        let arm = self
            .tool("sysctl")?
            .args(["-n", "hw.optional.arm64"])
            .run()?;
        if arm.success() && String::from_utf8_lossy(&arm.stdout).trim() == "1" {
            return Ok(true);
        }
        let said = self.ask("system_profiler", &["-xml", "SPiBridgeDataType"])?;
        parse_has_t2(&said)
    }

    /// Whether System Integrity Protection is on; `None` if that is not a plain yes or no.
    ///
    /// # Errors
    /// If the tool is missing or fails.
    pub fn is_protected(&self) -> Result<Option<bool>> {
        Ok(parse_is_protected(&self.ask_text("csrutil", &["status"])?))
    }
}

fn parse_version(said: &str) -> Option<Version> {
    let mut numbers = said.trim().split('.').map(str::parse);
    let major = numbers.next()?.ok()?;
    let minor = numbers.next().transpose().ok()?.unwrap_or(0);
    let rest = numbers.all(|number| number.is_ok());
    rest.then_some(Version { major, minor })
}

fn parse_is_protected(said: &str) -> Option<bool> {
    let status = said
        .lines()
        .find_map(|line| {
            line.trim()
                .split_once("System Integrity Protection status:")
        })?
        .1;
    match status.trim().trim_end_matches('.') {
        "enabled" => Some(true),
        "disabled" => Some(false),
        // Some of it, in a mixture of one's own.
        _ => None,
    }
}

/// One entry for the data type, with one item for the chip that bridges, where there is one.
fn parse_has_t2(said: &[u8]) -> Result<bool> {
    const TOOL: &str = "system_profiler";
    let value = parse(TOOL, said)?;
    for entry in dicts(TOOL, &value)? {
        for item in entry.list("_items")? {
            let name = item.text("ibridge_model_name").unwrap_or_default();
            if name.split(' ').any(|word| word == "T2") {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_compared() {
        let version = |text| parse_version(text);
        let catalina = Version {
            major: 10,
            minor: 15,
        };
        assert_eq!(version("10.15.7\n"), Some(catalina));
        assert!(version("10.14.6").unwrap() < catalina && version("11.0.1").unwrap() > catalina);
        assert!(version("26").unwrap() > catalina);
        assert_eq!(catalina.to_string(), "10.15");
        for bad in ["", "ten", "10.x", "10.15.", "-1.2", "99999999999.1"] {
            assert_eq!(version(bad), None, "{bad}");
        }
    }

    #[test]
    fn protection_is_on_off_or_unclear() {
        let said = |status| format!("System Integrity Protection status: {status}\n");
        assert_eq!(parse_is_protected(&said("enabled.")), Some(true));
        assert_eq!(parse_is_protected(&said("disabled.")), Some(false));
        let custom =
            said("unknown (Custom Configuration).") + "\nConfiguration:\n\tKext: disabled\n";
        assert_eq!(parse_is_protected(&custom), None);
        assert_eq!(parse_is_protected(""), None);
    }

    #[test]
    fn a_t2_is_told_from_a_t1_and_from_none() {
        let said = |items: &str| {
            let text = format!(
                "<plist version=\"1.0\"><array><dict><key>_dataType</key>
                 <string>SPiBridgeDataType</string><key>_items</key><array>{items}</array></dict>
                 </array></plist>"
            );
            parse_has_t2(text.as_bytes())
        };
        let chip = |name: &str| {
            said(&format!(
                "<dict><key>_name</key><string>c</string>
                 <key>ibridge_model_name</key><string>{name}</string></dict>"
            ))
        };
        assert!(chip("Apple T2 Security Chip").unwrap());
        assert!(!chip("Apple T1 Chip").unwrap());
        assert!(!said("").unwrap());
        assert!(said("<string>T2</string>").is_err());
        assert!(parse_has_t2(b"<plist><dict/></plist>").is_err());
    }
}
