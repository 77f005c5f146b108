//! Property lists as the tools print them (plist(5)): XML, of a bounded size and depth. A value of the
//! wrong type is an error where it is needed, and absent where it is not.

use plist::{Dictionary, Value};

use crate::error::{Error, Result};

/// Most arrays and dictionaries in one list. What is nested is dropped from inside another: this bounds
/// how deep, too.
const MOST_COLLECTIONS: usize = 4096;

/// A dictionary that a tool printed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dict<'a> {
    values: &'a Dictionary,
    tool: &'a str,
}

/// Reads the list that `tool` printed.
///
/// # Errors
/// If it is none, a binary one (no tool prints such), or holds too much.
pub(super) fn parse(tool: &str, said: &[u8]) -> Result<Value> {
    let wrong = |why: String| Error::invalid("cannot understand", tool, why);
    if said.starts_with(b"bplist") {
        return Err(wrong("a binary property list".to_owned()));
    }
    if !said.trim_ascii_end().ends_with(b"</plist>") {
        return Err(wrong("no property list, or not all of one".to_owned()));
    }
    let is_begun = |at: &[u8]| at.starts_with(b"<array") || at.starts_with(b"<dict");
    let collections = (0..said.len()).filter(|at| is_begun(&said[*at..])).count();
    if collections > MOST_COLLECTIONS {
        return Err(wrong(format!("more than {MOST_COLLECTIONS} lists in it")));
    }
    Value::from_reader_xml(said).map_err(|error| wrong(format!("no property list: {error}")))
}

impl<'a> Dict<'a> {
    /// What `tool` printed, if it is a dictionary.
    pub(super) fn of(tool: &'a str, value: &'a Value) -> Result<Self> {
        let none = || Error::invalid("cannot understand", tool, "not a dictionary");
        let values = value.as_dictionary().ok_or_else(none)?;
        Ok(Self { values, tool })
    }

    fn missing(&self, key: &str, what: &str) -> Error {
        let why = format!("its `{key}` is missing or no {what}");
        Error::invalid("cannot understand", self.tool, why)
    }

    /// A text, if there is one that is not empty.
    pub(super) fn text(&self, key: &str) -> Option<&'a str> {
        let text = self.values.get(key)?.as_string()?;
        (!text.is_empty()).then_some(text)
    }

    /// A text that must be there.
    pub(super) fn needed_text(&self, key: &str) -> Result<&'a str> {
        self.text(key).ok_or_else(|| self.missing(key, "text"))
    }

    /// A number that must be there.
    pub(super) fn needed_number(&self, key: &str) -> Result<u64> {
        let number = self.values.get(key).and_then(Value::as_unsigned_integer);
        number.ok_or_else(|| self.missing(key, "number"))
    }

    /// Yes or no, if that is said: also as words (`Sealed`).
    pub(super) fn flag(&self, key: &str) -> Option<bool> {
        match self.values.get(key)? {
            Value::Boolean(flag) => Some(*flag),
            Value::String(text) => match text.as_str() {
                "Yes" => Some(true),
                "No" => Some(false),
                _ => None,
            },
            _ => None,
        }
    }

    /// Yes or no, which must be said.
    pub(super) fn needed_flag(&self, key: &str) -> Result<bool> {
        self.flag(key).ok_or_else(|| self.missing(key, "yes or no"))
    }

    /// The dictionaries of a list; none if there is no such list.
    pub(super) fn list(&self, key: &str) -> Result<Vec<Self>> {
        match self.values.get(key) {
            None => Ok(Vec::new()),
            Some(list) => dicts(self.tool, list),
        }
    }

    /// The same of a list that must be there.
    pub(super) fn needed_list(&self, key: &str) -> Result<Vec<Self>> {
        let missing = || self.missing(key, "list");
        dicts(self.tool, self.values.get(key).ok_or_else(missing)?)
    }

    /// A list of texts; none if there is no such list.
    pub(super) fn texts(&self, key: &str) -> Result<Vec<String>> {
        let Some(list) = self.values.get(key) else {
            return Ok(Vec::new());
        };
        let texts = list.as_array().and_then(|list| {
            let texts = list.iter().map(|text| text.as_string().map(str::to_owned));
            texts.collect()
        });
        texts.ok_or_else(|| self.missing(key, "list of texts"))
    }

    /// The dictionary of this name, if there is one.
    pub(super) fn dict(&self, key: &str) -> Option<Self> {
        let values = self.values.get(key)?.as_dictionary()?;
        Some(Self { values, ..*self })
    }
}

/// A list of dictionaries.
pub(super) fn dicts<'a>(tool: &'a str, value: &'a Value) -> Result<Vec<Dict<'a>>> {
    let none = || Error::invalid("cannot understand", tool, "not a list");
    let list = value.as_array().ok_or_else(none)?;
    list.iter().map(|value| Dict::of(tool, value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_lists_are_errors_and_never_more() {
        let deep = |levels: usize| {
            let (begin, end) = ("<array>".repeat(levels), "</array>".repeat(levels));
            format!("<plist>{begin}{end}</plist>")
        };
        assert!(parse("tool", deep(MOST_COLLECTIONS).as_bytes()).is_ok());
        let hidden = format!("<plist>{}", "<array><!--</array>-->".repeat(100_000));
        for bad in [
            deep(MOST_COLLECTIONS + 1),
            deep(200_000),
            hidden,
            String::new(),
            "no list at all".to_owned(),
            "<plist><dict><key>a</key></dict></plist>".to_owned(),
            "<plist><dict><key>a</key><string>cut o".to_owned(),
            "<plist><dict/>".to_owned(),
            "<plist><integer>99999999999999999999999999</integer></plist>".to_owned(),
            "<plist><date>yesterday</date></plist>".to_owned(),
            "bplist00\u{8}".to_owned(),
        ] {
            let error = parse("tool", bad.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::InvalidData, "{bad:.60}");
        }
    }

    #[test]
    fn values_of_the_wrong_type_are_told() {
        let said = b"<plist><dict><key>n</key><integer>7</integer><key>m</key><integer>-7</integer>
            <key>t</key><string>text</string><key>e</key><string/><key>y</key><string>Yes</string>
            <key>f</key><false/><key>l</key><array><string>a</string><integer>1</integer></array>
            </dict></plist>";
        let value = parse("tool", said).unwrap();
        let dict = Dict::of("tool", &value).unwrap();
        assert_eq!(dict.needed_number("n").unwrap(), 7);
        for wrong in ["m", "t", "f", "none"] {
            assert!(dict.needed_number(wrong).is_err(), "{wrong}");
        }
        assert_eq!((dict.text("t"), dict.text("e")), (Some("text"), None));
        assert_eq!(dict.flag("y"), Some(true));
        assert_eq!(dict.flag("f"), Some(false));
        assert_eq!((dict.flag("t"), dict.flag("n")), (None, None));
        assert!(dict.needed_flag("t").is_err());
        assert!(dict.texts("l").is_err() && dict.list("l").is_err() && dict.list("t").is_err());
        assert!(dict.list("none").unwrap().is_empty() && dict.needed_list("none").is_err());
        let array = parse("tool", b"<plist><array/></plist>").unwrap();
        assert!(Dict::of("tool", &array).is_err());
    }
}
