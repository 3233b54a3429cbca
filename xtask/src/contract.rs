//! Released contracts of the hub API, and what today's may not do to them. The rules are in
//! docs/hub-api.md, "Versions".

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::path::Path;

use protox::Compiler;
use protox::prost_reflect::{
    Cardinality, DescriptorPool, EnumDescriptor, FieldDescriptor, Kind, MessageDescriptor,
    MethodDescriptor, ServiceDescriptor, Value,
};

use crate::Failed;
use crate::gen_proto::CALLERS;

/// The contract. Its neighbour, `worker.proto`, is between processes of one release.
const PROTO: &str = "hub/v1/hub.proto";
/// Folders, and the source with the version.
const INCLUDE: &str = "hub-proto/proto";
const GOLDEN: &str = "hub-proto/golden";
const SOURCE: &str = "hub-proto/src/lib.rs";

/// What a released contract let somebody call and today's does not, on purpose: the method as
/// `hub.v1.Service/Method`, and the caller. Each with the reason why no client of that release
/// misses it.
const TAKEN_BACK: [(&str, &str); 0] = [];

/// Version of a contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version {
    major: u32,
    minor: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl Version {
    /// What `API_VERSION` is in a source.
    fn in_source(text: &str) -> Option<Self> {
        let (_, rest) = text.split_once("pub const API_VERSION: (u32, u32) = (")?;
        let (numbers, _) = rest.split_once(')')?;
        let (major, minor) = numbers.split_once(',')?;
        Self::parse(major, minor)
    }

    /// Whose descriptors a file has, by its name.
    fn of_file(name: &str) -> Option<Self> {
        let version = name.strip_prefix("hub-v")?.strip_suffix(".binpb")?;
        let (major, minor) = version.split_once('.')?;
        Self::parse(major, minor)
    }

    fn parse(major: &str, minor: &str) -> Option<Self> {
        let number = |text: &str| text.trim().parse().ok();
        Some(Self {
            major: number(major)?,
            minor: number(minor)?,
        })
    }

    /// Where its descriptors are, in the repository.
    fn file(self) -> String {
        format!("{GOLDEN}/hub-v{self}.binpb")
    }

    /// The minor version before.
    fn previous(self) -> Option<Self> {
        let minor = self.minor.checked_sub(1)?;
        Some(Self { minor, ..self })
    }
}

/// Today's contract may be served to clients of those that were released.
pub(crate) fn check(root: &Path) -> Result<(), Failed> {
    let (version, bytes) = today(root)?;
    let wrong = judge(version, &pool(&bytes)?, &released(root)?);
    fail(&wrong)
}

/// Writes today's contract down as released, unless it is.
pub(crate) fn release(root: &Path) -> Result<(), Failed> {
    let (version, bytes) = today(root)?;
    let released = released(root)?;
    fail(&judge(version, &pool(&bytes)?, &released))?;
    let file = version.file();
    if released.contains_key(&version) {
        println!("{file} is there, and today's contract is the same");
        return Ok(());
    }
    std::fs::create_dir_all(root.join(GOLDEN))?;
    std::fs::write(root.join(&file), bytes)?;
    println!("wrote {file}: from now on API {version} does not change");
    Ok(())
}

fn fail(wrong: &[String]) -> Result<(), Failed> {
    if wrong.is_empty() {
        return Ok(());
    }
    Err(Failed::new(format!(
        "the hub API is not what was released:\n       {}\n  fix: as each line says, or raise the \
         major of API_VERSION in {SOURCE}: docs/hub-api.md, \"Versions\"",
        wrong.join("\n       ")
    )))
}

/// The version of today's contract, and its descriptors.
fn today(root: &Path) -> Result<(Version, Vec<u8>), Failed> {
    let source = std::fs::read_to_string(root.join(SOURCE))?;
    let version = Version::in_source(&source)
        .ok_or_else(|| Failed::new(format!("there is no API_VERSION in {SOURCE}")))?;
    Ok((version, compile(&root.join(INCLUDE))?))
}

/// Descriptors without comments and places, so that only a change of the contract changes them.
fn compile(include: &Path) -> Result<Vec<u8>, Failed> {
    let compiled = Compiler::new([include]).and_then(|mut compiler| {
        compiler.include_imports(true).include_source_info(false);
        compiler.open_file(PROTO)?;
        // The one encoding that keeps our own option.
        Ok(compiler.encode_file_descriptor_set())
    });
    compiled.map_err(|e| Failed::new(format!("{PROTO} does not compile: {e:?}")))
}

fn pool(bytes: &[u8]) -> Result<DescriptorPool, Failed> {
    DescriptorPool::decode(bytes).map_err(|e| Failed::new(format!("descriptors: {e}")))
}

/// The released contracts.
fn released(root: &Path) -> Result<BTreeMap<Version, DescriptorPool>, Failed> {
    let mut all = BTreeMap::new();
    let dir = root.join(GOLDEN);
    if !dir.exists() {
        return Ok(all);
    }
    for entry in std::fs::read_dir(dir)? {
        let name = entry?.file_name();
        let version = name
            .to_str()
            .and_then(Version::of_file)
            .ok_or_else(|| Failed::new(format!("{GOLDEN}: {} is no contract", name.display())))?;
        let bytes = std::fs::read(root.join(version.file()))?;
        let pool = pool(&bytes).map_err(|Failed(e)| Failed::new(version.file() + ": " + &e))?;
        all.insert(version, pool);
    }
    Ok(all)
}

/// What is wrong with a contract of this version, as there are these released ones.
fn judge(
    version: Version,
    today: &DescriptorPool,
    released: &BTreeMap<Version, DescriptorPool>,
) -> Vec<String> {
    let mut wrong = Vec::new();
    if let Some((newest, _)) = released.last_key_value().filter(|(v, _)| **v > version) {
        wrong.push(format!(
            "API {newest} is released and API_VERSION is {version}: raise it"
        ));
    }
    if let Some(previous) = version.previous().filter(|v| !released.contains_key(v)) {
        wrong.push(format!(
            "{} is not there: before API_VERSION is raised to {version}, `cargo xtask gen \
             --golden` writes it",
            previous.file()
        ));
    }
    // What is missed of one release is missed of the next ones too.
    let mut broken = BTreeMap::<String, Vec<String>>::new();
    for (old, pool) in released.iter().filter(|(v, _)| v.major == version.major) {
        for text in breaks(pool, today, &TAKEN_BACK) {
            broken.entry(text).or_default().push(old.to_string());
        }
    }
    if broken.is_empty()
        && let Some(same) = released.get(&version)
    {
        wrong.extend(differences(same, today).iter().map(|line| {
            format!("API {version} is released and this changed: {line}: raise its minor version")
        }));
    }
    let since = |(text, of): (String, Vec<String>)| format!("{text} (in API {})", of.join(", "));
    wrong.extend(broken.into_iter().map(since));
    wrong
}

/// Whether a package is ours, and not what protobuf itself brings along.
fn ours(package: &str) -> bool {
    !package.starts_with("google.protobuf")
}

/// What clients of `old` would miss in `new`, or understand in another way.
fn breaks(old: &DescriptorPool, new: &DescriptorPool, taken_back: &[(&str, &str)]) -> Vec<String> {
    let mut out = Vec::new();
    for was in old.files() {
        if let Some(is) = new.get_file_by_name(was.name())
            && was.package_name() != is.package_name()
        {
            out.push(format!(
                "{}: the package was {} and is {}: name it as it was",
                was.name(),
                was.package_name(),
                is.package_name()
            ));
        }
    }
    if !out.is_empty() {
        // Each thing in it would be said to be gone.
        return out;
    }
    for was in old.services().filter(|s| ours(s.package_name())) {
        service(&was, new, taken_back, &mut out);
    }
    for was in old.all_messages().filter(is_written) {
        message(&was, new, &mut out);
    }
    for was in old.all_enums().filter(|e| ours(e.package_name())) {
        enumeration(&was, new, &mut out);
    }
    out
}

/// Whether a message is one of ours, and not the entry of a map.
fn is_written(message: &MessageDescriptor) -> bool {
    ours(message.package_name()) && !message.is_map_entry()
}

fn service(
    was: &ServiceDescriptor,
    new: &DescriptorPool,
    taken_back: &[(&str, &str)],
    out: &mut Vec<String>,
) {
    let name = was.full_name();
    let Some(is) = new.get_service_by_name(name) else {
        out.push(format!("service {name} is gone: keep it"));
        return;
    };
    for method in was.methods() {
        let path = format!("{name}/{}", method.name());
        let Some(now) = is.methods().find(|m| m.name() == method.name()) else {
            out.push(format!("method {path} is gone: keep it"));
            continue;
        };
        let (before, after) = (signature(&method), signature(&now));
        if before != after {
            out.push(format!(
                "method {path} was `{before}` and is `{after}`: leave it as it was, and add a \
                 method beside it"
            ));
        }
        // A contract from before there were callers lets nobody in by name.
        let Some(before) = callers(&method) else {
            continue;
        };
        let after = callers(&now).unwrap_or_default();
        for caller in before.iter().filter(|c| !lets(&after, c)) {
            if !taken_back.contains(&(path.as_str(), caller.as_str())) {
                out.push(format!(
                    "method {path} is no longer {caller}'s to call: let {caller} call it, or say \
                     in TAKEN_BACK (xtask/src/contract.rs) why no client misses it"
                ));
            }
        }
    }
}

/// Whether a method with these callers lets this one in. Whoever joins has no identity yet, and is
/// not anybody.
fn lets(callers: &BTreeSet<String>, caller: &str) -> bool {
    callers.contains(caller) || (caller != "joining" && callers.contains("any"))
}

fn message(was: &MessageDescriptor, new: &DescriptorPool, out: &mut Vec<String>) {
    let name = was.full_name();
    let Some(is) = new.get_message_by_name(name) else {
        out.push(format!("message {name} is gone: keep it"));
        return;
    };
    let kept: Vec<Range<i64>> = is.reserved_ranges().map(range_of_message).collect();
    for field in was.fields() {
        let (number, before) = (field.number(), declaration(&field));
        match is.get_field(number).map(|now| declaration(&now)) {
            Some(after) if after == before => {}
            Some(after) => out.push(format!(
                "message {name}: field {number} was `{before}` and is `{after}`: leave it as it \
                 was, and add a field with a new number"
            )),
            None if kept.iter().any(|r| r.contains(&i64::from(number))) => {}
            None => out.push(format!(
                "message {name}: field {number}, `{before}`, is gone: write `reserved {number};`"
            )),
        }
    }
    for range in was.reserved_ranges().map(range_of_message) {
        if let Some(number) = first_free(&range, &kept) {
            out.push(free_again("message", name, number));
        }
    }
}

fn enumeration(was: &EnumDescriptor, new: &DescriptorPool, out: &mut Vec<String>) {
    let name = was.full_name();
    let Some(is) = new.get_enum_by_name(name) else {
        out.push(format!("enum {name} is gone: keep it"));
        return;
    };
    let range = |r: std::ops::RangeInclusive<i32>| i64::from(*r.start())..i64::from(*r.end()) + 1;
    let kept: Vec<Range<i64>> = is.reserved_ranges().map(range).collect();
    for value in was.values() {
        let (number, before) = (value.number(), value.name());
        // There may be several of one number.
        let names: Vec<String> = is
            .values()
            .filter(|v| v.number() == number)
            .map(|v| v.name().to_owned())
            .collect();
        if names.is_empty() {
            if !kept.iter().any(|r| r.contains(&i64::from(number))) {
                out.push(format!(
                    "enum {name}: value {number}, {before}, is gone: write `reserved {number};`"
                ));
            }
        } else if !names.iter().any(|n| n == before) {
            out.push(format!(
                "enum {name}: value {number} was {before} and is {}: leave it as it was, and add \
                 a value with a new number",
                names.join(", ")
            ));
        }
    }
    for range in was.reserved_ranges().map(range) {
        if let Some(number) = first_free(&range, &kept) {
            out.push(free_again("enum", name, number));
        }
    }
}

fn free_again(what: &str, name: &str, number: i64) -> String {
    format!("{what} {name}: {number} was reserved and is not: write `reserved {number};` again")
}

fn range_of_message(range: Range<u32>) -> Range<i64> {
    i64::from(range.start)..i64::from(range.end)
}

/// The first number of a range that is in none of these.
fn first_free(range: &Range<i64>, kept: &[Range<i64>]) -> Option<i64> {
    let mut at = range.start;
    while at < range.end {
        match kept.iter().find(|k| k.contains(&at)) {
            Some(k) => at = k.end,
            None => return Some(at),
        }
    }
    None
}

/// A field as it is written down.
fn declaration(field: &FieldDescriptor) -> String {
    let kind = match field.kind() {
        Kind::Message(entry) if field.is_map() => format!(
            "map<{:?}, {:?}>",
            entry.map_entry_key_field().kind(),
            entry.map_entry_value_field().kind()
        ),
        kind => format!("{kind:?}"),
    };
    let oneof = field.containing_oneof().filter(|o| !o.is_synthetic());
    // A message can be absent whether it is said or not.
    let optional = field.supports_presence() && field.kind().as_message().is_none();
    let label = match field.cardinality() {
        Cardinality::Repeated if !field.is_map() => "repeated ",
        Cardinality::Required => "required ",
        Cardinality::Optional if optional && oneof.is_none() => "optional ",
        Cardinality::Repeated | Cardinality::Optional => "",
    };
    let place = oneof.map_or_else(String::new, |o| format!(" in oneof {}", o.name()));
    format!("{label}{kind} {} = {}{place}", field.name(), field.number())
}

/// What goes in and out of a method, as it is written down.
fn signature(method: &MethodDescriptor) -> String {
    let stream = |yes| if yes { "stream " } else { "" };
    format!(
        "({}{}) returns ({}{})",
        stream(method.is_client_streaming()),
        method.input().full_name(),
        stream(method.is_server_streaming()),
        method.output().full_name()
    )
}

/// Who may call a method. None if the contract says that of no method.
fn callers(method: &MethodDescriptor) -> Option<BTreeSet<String>> {
    let option = method.parent_pool().get_extension_by_name(CALLERS)?;
    let options = method.options();
    let words = match &*options.get_extension(&option) {
        Value::String(words) => words.split_whitespace().map(str::to_owned).collect(),
        _ => BTreeSet::new(),
    };
    Some(words)
}

/// What was taken from a contract and added to it.
fn differences(old: &DescriptorPool, new: &DescriptorPool) -> Vec<String> {
    let (old, new) = (written(old), written(new));
    let gone = old.difference(&new).map(|line| format!("- {line}"));
    let added = new.difference(&old).map(|line| format!("+ {line}"));
    gone.chain(added).collect()
}

/// Everything that a contract says, a line for each.
fn written(pool: &DescriptorPool) -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    for service in pool.services().filter(|s| ours(s.package_name())) {
        let name = service.full_name();
        lines.insert(format!("service {name}"));
        for method in service.methods() {
            let callers = Vec::from_iter(callers(&method).unwrap_or_default()).join(" ");
            let signature = signature(&method);
            lines.insert(format!(
                "method {name}/{}{signature} for {callers:?}",
                method.name()
            ));
        }
    }
    for message in pool.all_messages().filter(is_written) {
        let name = message.full_name();
        lines.insert(format!("message {name}"));
        let fields = message.fields().map(|f| declaration(&f));
        let kept = message
            .reserved_ranges()
            .map(|r| reserved(&range_of_message(r)));
        lines.extend(fields.chain(kept).map(|s| format!("message {name}: {s}")));
    }
    for one in pool.all_enums().filter(|e| ours(e.package_name())) {
        let name = one.full_name();
        lines.insert(format!("enum {name}"));
        let values = one
            .values()
            .map(|v| format!("{} = {}", v.name(), v.number()));
        let kept = one
            .reserved_ranges()
            .map(|r| reserved(&(i64::from(*r.start())..i64::from(*r.end()) + 1)));
        lines.extend(values.chain(kept).map(|s| format!("enum {name}: {s}")));
    }
    lines
}

fn reserved(range: &Range<i64>) -> String {
    format!("reserved {} to {}", range.start, range.end - 1)
}

#[cfg(test)]
mod tests;
