use super::*;

const BASE: &str = r#"
        syntax = "proto3";
        package hub.v1;
        import "google/protobuf/descriptor.proto";
        extend google.protobuf.MethodOptions { string callers = 50100; }
        service Hub {
          rpc Ask(Question) returns (Reply) { option (callers) = "deals operator"; }
          rpc Watch(Question) returns (stream Reply) { option (callers) = "any"; }
          rpc Join(Question) returns (Reply) { option (callers) = "joining"; }
        }
        service Extra {}
        message Question {
          string about = 1;
          optional uint64 after = 2;
          map<string, string> tags = 3;
          reserved 8, 20 to max;
        }
        message Reply {
          oneof what { string text = 1; bytes data = 2; }
          repeated uint32 numbers = 3;
          Mood mood = 4;
          message Inner { bool told = 1; }
          Inner inner = 5;
        }
        message Detail {}
        enum Mood { MOOD_UNSPECIFIED = 0; MOOD_GOOD = 1; MOOD_BAD = 2; reserved 7; }
        enum Shade { SHADE_UNSPECIFIED = 0; }
    "#;

const API: Version = Version { major: 1, minor: 2 };

fn contract(text: &str) -> DescriptorPool {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(PROTO);
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(file, text).unwrap();
    let bytes = compile(dir.path()).unwrap_or_else(|Failed(e)| panic!("{e}: {text}"));
    pool(&bytes).unwrap_or_else(|Failed(e)| panic!("{e}: {text}"))
}

/// [`BASE`] with something in the place of something else.
fn changed(from: &str, to: &str) -> DescriptorPool {
    assert_eq!(BASE.matches(from).count(), 1, "{from}");
    contract(&BASE.replace(from, to))
}

#[test]
fn every_break_is_found() {
    let old = contract(BASE);
    // What is in the place of what, and the one thing that is said of it.
    for (from, to, said) in [
        // services and methods
        (
            "package hub.v1;",
            "package hub.v2;",
            "the package was hub.v1 and is hub.v2",
        ),
        ("service Extra {}", "", "service hub.v1.Extra is gone"),
        (
            "service Extra {}",
            "service More {}",
            "service hub.v1.Extra is gone",
        ),
        (
            r#"rpc Join(Question) returns (Reply) { option (callers) = "joining"; }"#,
            "",
            "method hub.v1.Hub/Join is gone",
        ),
        ("rpc Ask(", "rpc Enquire(", "method hub.v1.Hub/Ask is gone"),
        (
            "Ask(Question) returns",
            "Ask(Detail) returns",
            "was `(hub.v1.Question) returns (hub.v1.Reply)` and is `(hub.v1.Detail) returns \
                 (hub.v1.Reply)`",
        ),
        (
            "Ask(Question) returns (Reply)",
            "Ask(Question) returns (Detail)",
            "and is `(hub.v1.Question) returns (hub.v1.Detail)`",
        ),
        (
            "Ask(Question) returns",
            "Ask(stream Question) returns",
            "and is `(stream hub.v1.Question) returns (hub.v1.Reply)`",
        ),
        (
            "returns (stream Reply)",
            "returns (Reply)",
            "method hub.v1.Hub/Watch was `(hub.v1.Question) returns (stream hub.v1.Reply)`",
        ),
        // callers
        (
            "\"deals operator\"",
            "\"operator\"",
            "method hub.v1.Hub/Ask is no longer deals's to call",
        ),
        (
            "\"any\"",
            "\"deals indexing\"",
            "method hub.v1.Hub/Watch is no longer any's",
        ),
        (
            "\"joining\"",
            "\"any\"",
            "method hub.v1.Hub/Join is no longer joining's",
        ),
        (
            r#"{ option (callers) = "joining"; }"#,
            "{}",
            "method hub.v1.Hub/Join is no longer joining's",
        ),
        // fields
        (
            "string about = 1;",
            "",
            "message hub.v1.Question: field 1, `string about = 1`, is gone: write `reserved 1;`",
        ),
        (
            "string about = 1;",
            "string topic = 1;",
            "and is `string topic = 1`",
        ),
        (
            "string about = 1;",
            "bytes about = 1;",
            "and is `bytes about = 1`",
        ),
        (
            "string about = 1;",
            "bool loud = 1;",
            "was `string about = 1` and is `bool loud = 1`",
        ),
        (
            "string about = 1;",
            "string about = 5;",
            "field 1, `string about = 1`, is gone",
        ),
        (
            "string about = 1;",
            "repeated string about = 1;",
            "and is `repeated string about = 1`",
        ),
        (
            "string about = 1;",
            "optional string about = 1;",
            "and is `optional string about = 1`",
        ),
        (
            "string about = 1;",
            "oneof x { string about = 1; }",
            "and is `string about = 1 in oneof x`",
        ),
        (
            "optional uint64 after",
            "uint64 after",
            "was `optional uint64 after = 2` and is `uint64",
        ),
        (
            "repeated uint32 numbers",
            "uint32 numbers",
            "was `repeated uint32 numbers = 3`",
        ),
        (
            "map<string, string>",
            "map<string, bytes>",
            "was `map<string, string> tags = 3`",
        ),
        (
            "string text = 1; bytes data = 2; }",
            "string text = 1; } bytes data = 2;",
            "was `bytes data = 2 in oneof what` and is `bytes data = 2`",
        ),
        (
            "Inner inner = 5;",
            "Detail inner = 5;",
            "and is `hub.v1.Detail inner = 5`",
        ),
        (
            "bool told = 1;",
            "",
            "message hub.v1.Reply.Inner: field 1, `bool told = 1`, is gone",
        ),
        // messages and enums
        ("message Detail {}", "", "message hub.v1.Detail is gone"),
        (
            "enum Shade { SHADE_UNSPECIFIED = 0; }",
            "",
            "enum hub.v1.Shade is gone",
        ),
        (
            "MOOD_BAD = 2;",
            "",
            "enum hub.v1.Mood: value 2, MOOD_BAD, is gone: write `reserved 2;`",
        ),
        (
            "MOOD_BAD = 2;",
            "MOOD_FOUL = 2;",
            "value 2 was MOOD_BAD and is MOOD_FOUL",
        ),
        (
            "MOOD_BAD = 2;",
            "MOOD_BAD = 3;",
            "value 2, MOOD_BAD, is gone",
        ),
        // reserved numbers
        (
            "reserved 8, 20 to max;",
            "reserved 20 to max;",
            "message hub.v1.Question: 8 was reserved",
        ),
        (
            "reserved 8, 20 to max;",
            "reserved 8, 22 to max;",
            "message hub.v1.Question: 20 was",
        ),
        (
            "reserved 8, 20 to max;",
            "uint32 eight = 8; reserved 20 to max;",
            ": 8 was reserved",
        ),
        ("reserved 7;", "", "enum hub.v1.Mood: 7 was reserved"),
        (
            "reserved 7;",
            "MOOD_SOUR = 7;",
            "enum hub.v1.Mood: 7 was reserved",
        ),
    ] {
        let found = breaks(&old, &changed(from, to), &[]);
        assert_eq!(found.len(), 1, "{from} -> {to}: {found:#?}");
        assert!(found[0].contains(said), "{from} -> {to}: {found:#?}");
    }
}

#[test]
fn additions_break_nothing_but_are_no_part_of_a_released_version() {
    let old = contract(BASE);
    let next = Version { minor: 3, ..API };
    for (from, to) in [
        (
            "service Extra {}",
            "service Extra { rpc More(Detail) returns (Detail); }",
        ),
        ("service Extra {}", "service Extra {} service More {}"),
        ("\"deals operator\"", "\"deals indexing operator\""),
        ("\"deals operator\"", "\"any\""),
        ("\"joining\"", "\"joining any\""),
        ("string about = 1;", "string about = 1; string more = 4;"),
        ("string about = 1;", "reserved 1;"),
        ("string about = 1;", "string about = 5; reserved 1;"),
        ("bytes data = 2;", "bytes data = 2; string more = 6;"),
        ("message Detail {}", "message Detail { string kind = 1; }"),
        ("message Detail {}", "message Detail {} message More {}"),
        (
            "reserved 8, 20 to max;",
            "reserved 8 to 10, 20 to 40, 41 to max;",
        ),
        ("MOOD_BAD = 2;", "MOOD_BAD = 2; MOOD_MIXED = 3;"),
        ("MOOD_BAD = 2;", "reserved 2;"),
        (
            "enum Shade {",
            "enum More { MORE_UNSPECIFIED = 0; } enum Shade {",
        ),
    ] {
        let new = changed(from, to);
        assert_eq!(breaks(&old, &new, &[]), [""; 0], "{from} -> {to}");
        let released = BTreeMap::from([(API, old.clone())]);
        assert_eq!(judge(next, &new, &released), [""; 0], "{from} -> {to}");

        let wrong = differences(&old, &new);
        assert!(!wrong.is_empty(), "{from} -> {to}");
        let mut released = released;
        released.insert(API.previous().unwrap(), old.clone());
        let judged = judge(API, &new, &released);
        assert_eq!(judged.len(), wrong.len(), "{from} -> {to}: {judged:#?}");
        assert!(judged[0].contains("API 1.2 is released"), "{judged:#?}");
    }
}

#[test]
fn comments_places_and_files_are_not_the_contract() {
    let old = contract(BASE);
    let reply = BASE.find("message Reply").unwrap();
    let (first, second) = BASE.split_at(reply);
    let (reply, rest) = second.split_at(second.find("message Detail").unwrap());
    for text in [
        BASE.replace("service Hub", "// Who answers.\n service Hub"),
        BASE.replace("Inner inner = 5;", "optional Inner inner = 5;"),
        BASE.replace("deals operator", "operator  deals"),
        format!("{first}{rest}{reply}"),
    ] {
        let new = contract(&text);
        assert_eq!(breaks(&old, &new, &[]), [""; 0], "{text}");
        assert_eq!(differences(&old, &new), [""; 0], "{text}");
    }
}

#[test]
fn a_right_is_taken_back_on_purpose_alone() {
    let (old, new) = (
        contract(BASE),
        changed("\"deals operator\"", "\"operator\""),
    );
    let one = [("hub.v1.Hub/Ask", "deals")];
    assert_eq!(breaks(&old, &new, &one), [""; 0]);
    for other in [
        ("hub.v1.Hub/Ask", "operator"),
        ("hub.v1.Hub/Watch", "deals"),
    ] {
        assert_eq!(breaks(&old, &new, &[other]).len(), 1);
    }
}

#[test]
fn a_contract_without_callers_lets_nobody_in_by_name() {
    let mut bare = BASE.to_owned();
    for who in ["deals operator", "any", "joining"] {
        bare = bare.replace(&format!("option (callers) = {who:?};"), "");
    }
    bare = bare.replace(
        "extend google.protobuf.MethodOptions { string callers = 50100; }",
        "",
    );
    let bare = contract(&bare);
    assert_eq!(breaks(&bare, &contract(BASE), &[]), [""; 0]);
    // The other way round everybody loses what was theirs.
    assert_eq!(breaks(&contract(BASE), &bare, &[]).len(), 4);
}

#[test]
fn versions_and_their_files_go_together() {
    let of = |major, minor| Version { major, minor };
    let base = || contract(BASE);
    let all = |versions: &[Version]| -> BTreeMap<Version, DescriptorPool> {
        versions.iter().map(|v| (*v, base())).collect()
    };
    for (version, released, said) in [
        (of(1, 2), vec![of(1, 1)], None),
        (of(1, 2), vec![of(1, 1), of(1, 2)], None),
        (of(1, 0), vec![], None),
        (of(2, 0), vec![of(1, 1), of(1, 2)], None),
        (
            of(1, 2),
            vec![],
            Some("hub-proto/golden/hub-v1.1.binpb is not there"),
        ),
        (
            of(1, 3),
            vec![of(1, 1)],
            Some("hub-v1.2.binpb is not there"),
        ),
        (
            of(1, 2),
            vec![of(1, 1), of(1, 3)],
            Some("API 1.3 is released"),
        ),
    ] {
        let wrong = judge(version, &base(), &all(&released));
        match said {
            None => assert_eq!(wrong, [""; 0], "{version}"),
            Some(said) => assert!(wrong[0].contains(said), "{version}: {wrong:#?}"),
        }
    }

    // A new major owes nothing to those before, and a break is told once.
    let broken = changed("string about = 1;", "");
    let two = all(&[of(1, 1), of(1, 2)]);
    assert_eq!(judge(of(2, 0), &broken, &two), [""; 0]);
    let wrong = judge(of(1, 3), &broken, &two);
    assert_eq!(wrong.len(), 1, "{wrong:#?}");
    assert!(wrong[0].ends_with("(in API 1.1, 1.2)"), "{wrong:#?}");
}

#[test]
fn versions_are_read() {
    let source = "/// API.\npub const API_VERSION: (u32, u32) = (1, 12);\n";
    let version = Version {
        major: 1,
        minor: 12,
    };
    assert_eq!(Version::in_source(source), Some(version));
    assert_eq!(Version::in_source("const API_VERSION: u32 = 1;"), None);
    assert_eq!(version.file(), "hub-proto/golden/hub-v1.12.binpb");
    assert_eq!(Version::of_file("hub-v1.12.binpb"), Some(version));
    for name in [
        "hub-v1.binpb",
        "hub-v1.x.binpb",
        "hub-v1.2.bin",
        "README.md",
    ] {
        assert_eq!(Version::of_file(name), None, "{name}");
    }
}
