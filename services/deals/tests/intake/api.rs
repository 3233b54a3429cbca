//! The description of the interface: it is sound, and every answer of these tests is as it says.

use std::collections::BTreeSet;

use lotus_deals::mk20::{BASE, Code};
use lotus_deals::openapi::PATHS;
use serde_json::{Value, json};

use crate::Net;

async fn document(client: &reqwest::Client, base: &str, path: &str) -> Value {
    let response = client.get(format!("{base}{path}")).send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "application/json");
    response.json().await.unwrap()
}

fn fits(template: &str, path: &str) -> bool {
    let (a, b): (Vec<_>, Vec<_>) = (template.split('/').collect(), path.split('/').collect());
    a.len() == b.len() && a.iter().zip(&b).all(|(t, p)| t.starts_with('{') || t == p)
}

/// A schema of the document, ready to check values.
fn validator(document: &Value, schema: &Value) -> jsonschema::Validator {
    let mut root = schema.clone();
    root["components"] = document["components"].clone();
    jsonschema::draft202012::new(&root).unwrap()
}

/// Checks an answer against the service's own description.
pub(crate) async fn check(
    client: &reqwest::Client,
    method: &reqwest::Method,
    url: &reqwest::Url,
    code: u16,
    body: &Value,
) {
    let base = url.origin().ascii_serialization();
    let document = document(client, &base, PATHS[0]).await;
    let paths = document["paths"].as_object().unwrap();
    // A literal part wins over a variable one.
    let found = paths
        .iter()
        .filter(|(template, _)| fits(template, url.path()))
        .min_by_key(|(template, _)| template.matches('{').count());
    let (template, of_path) = found.unwrap_or_else(|| panic!("{url} is not described"));
    let name = method.as_str().to_ascii_lowercase();
    let answer = &of_path[&name]["responses"][code.to_string()];
    assert!(
        answer.is_object(),
        "{method} {template}: {code} is not described"
    );
    let schema = &answer["content"]["application/json"]["schema"];
    if schema.is_null() {
        assert_eq!(body, &json!(""), "{method} {template}: {code} has no body");
        return;
    }
    let validator = validator(&document, schema);
    let wrong: Vec<String> = validator.iter_errors(body).map(|e| e.to_string()).collect();
    assert!(
        wrong.is_empty(),
        "{method} {template} {code}: {wrong:?}: {body}"
    );
}

#[tokio::test]
async fn the_description_is_sound_and_complete() {
    let net = Net::new(|_| {}).await;
    let document = document(&net.http, &net.base, PATHS[0]).await;
    assert_eq!(
        document,
        self::document(&net.http, &net.base, PATHS[1]).await
    );
    assert_eq!(document["openapi"], "3.1.0");

    // Every operation of MK20 and of the uploads of pieces.
    let mut described = BTreeSet::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            described.insert(format!("{} {path}", method.to_uppercase()));
            assert!(!operation["summary"].as_str().unwrap().is_empty());
            let responses = operation["responses"].as_object().unwrap();
            for (code, _) in Code::ALL {
                assert!(responses.contains_key(&(code as u16).to_string()));
            }
            // Each schema can be used.
            let bodies = responses.values().chain([&operation["requestBody"]]);
            for body in bodies {
                let schema = &body["content"]["application/json"]["schema"];
                if !schema.is_null() {
                    validator(&document, schema);
                }
            }
            // Served: not the answer for an unknown path or method.
            let url = format!("{}{}", net.base, path.replace(['{', '}'], ""));
            let method = method.to_uppercase().parse().unwrap();
            let answer = net.http.request(method, url).send().await.unwrap();
            let code = answer.status().as_u16();
            let text = answer.text().await.unwrap();
            assert_ne!(code, 405, "{path}");
            assert!(!text.contains("there is nothing at this path"), "{path}");
        }
    }
    let mk20 = [
        "POST /deal",
        "POST /update/{id}",
        "GET /status/{id}",
        "PUT /upload/{id}",
        "POST /upload/{id}",
        "POST /uploads/{id}",
        "GET /uploads/{id}",
        "PUT /uploads/{id}/{chunk}",
        "POST /uploads/finalize/{id}",
        "GET /products",
        "GET /sources",
        "GET /contracts",
    ];
    let pdp = [
        "GET /pdp/ping",
        "POST /pdp/piece",
        "GET /pdp/piece",
        "GET /pdp/piece/{id}/status",
        "PUT /pdp/piece/upload/{id}",
        "POST /pdp/piece/uploads",
        "PUT /pdp/piece/uploads/{id}",
        "POST /pdp/piece/uploads/{id}",
    ];
    let mk20 = mk20
        .iter()
        .map(|o| o.replacen(" /", &format!(" {BASE}/"), 1));
    let wanted: BTreeSet<String> = mk20.chain(pdp.map(str::to_owned)).collect();
    assert_eq!(described, wanted);

    // What a proposal is, is told apart from what it is not.
    let deal = &document["paths"][format!("{BASE}/deal")]["post"]["requestBody"]["content"];
    let proposals = validator(&document, &deal["application/json"]["schema"]);
    let good = net.deal(ulid::Ulid::from(1u128), b"some bytes");
    assert!(proposals.is_valid(&good));
    for (field, value) in [
        ("identifier", json!(5)),
        ("data", json!({"format": {}})),
        ("products", json!({"ddo_v1": {"provider": "t01000"}})),
    ] {
        let mut bad = good.clone();
        bad[field] = value;
        assert!(!proposals.is_valid(&bad), "{field}");
    }
}
