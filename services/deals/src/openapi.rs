//! The description of the HTTP interface. A route is served and described by one call, and its
//! bodies are described by the types that read and write them, so neither can lack the other.

use axum::Router;
use axum::routing::MethodRouter;
use http::Method;
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use crate::mk20::{Code, Refusal};

/// Where the description is served; the second is where Curio has it.
pub const PATHS: [&str; 2] = ["/openapi.json", "/market/mk20/info/swagger.json"];

/// What a body is.
#[derive(Clone, Copy)]
enum Body {
    Json(fn(&mut SchemaGenerator) -> Schema),
    Bytes,
}

impl Body {
    fn describe(self, types: &mut SchemaGenerator) -> Value {
        match self {
            Self::Json(schema) => {
                json!({"application/json": {"schema": schema(types).as_value()}})
            }
            Self::Bytes => json!({"application/octet-stream": {}}),
        }
    }
}

/// One operation on one path.
#[derive(Clone)]
pub(crate) struct Operation {
    summary: &'static str,
    signed: bool,
    query: Option<&'static str>,
    request: Option<(Body, bool)>,
    answers: Vec<(u16, &'static str, Option<Body>)>,
    location: bool,
}

impl Operation {
    /// With what it does, in a few words.
    pub(crate) const fn new(summary: &'static str) -> Self {
        Self {
            summary,
            signed: false,
            query: None,
            request: None,
            answers: Vec::new(),
            location: false,
        }
    }

    /// It needs the `Authorization` header.
    pub(crate) const fn signed(mut self) -> Self {
        self.signed = true;
        self
    }

    /// It needs this in the query.
    pub(crate) const fn query(mut self, name: &'static str) -> Self {
        self.query = Some(name);
        self
    }

    /// Its body is this, as JSON.
    pub(crate) fn takes<T: JsonSchema>(mut self, required: bool) -> Self {
        self.request = Some((Body::Json(SchemaGenerator::subschema_for::<T>), required));
        self
    }

    /// Its body is the bytes of a piece, or of a part of one.
    pub(crate) const fn takes_bytes(mut self) -> Self {
        self.request = Some((Body::Bytes, true));
        self
    }

    /// It answers with this, as JSON.
    pub(crate) fn gives<T: JsonSchema>(mut self, status: u16, what: &'static str) -> Self {
        let body = Body::Json(SchemaGenerator::subschema_for::<T>);
        self.answers.push((status, what, Some(body)));
        self
    }

    /// It answers with this status, and no body.
    pub(crate) fn gives_nothing(mut self, status: u16, what: &'static str) -> Self {
        self.answers.push((status, what, None));
        self
    }

    /// A 201 has a `Location` header.
    pub(crate) const fn locates(mut self) -> Self {
        self.location = true;
        self
    }

    fn describe(&self, path: &str, types: &mut SchemaGenerator) -> Value {
        let mut parameters: Vec<Value> = path
            .split('/')
            .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
            .map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}))
            .collect();
        if let Some(name) = self.query {
            parameters.push(
                json!({"name": name, "in": "query", "required": true, "schema": {"type": "string"}}),
            );
        }
        let refusal = types.subschema_for::<Refusal>();
        let mut responses = Map::new();
        for (code, what) in Code::ALL {
            let content = json!({"application/json": {"schema": refusal.as_value()}});
            let answer = json!({"description": what, "content": content});
            responses.insert((code as u16).to_string(), answer);
        }
        for (status, what, body) in &self.answers {
            let mut answer = json!({"description": what});
            if let Some(body) = body {
                answer["content"] = body.describe(types);
            }
            if self.location && *status == 201 {
                answer["headers"] = json!({"Location": {"schema": {"type": "string"}}});
            }
            responses.insert(status.to_string(), answer);
        }
        let mut out = json!({
            "summary": self.summary,
            "parameters": parameters,
            "responses": responses,
        });
        if let Some((body, required)) = self.request {
            out["requestBody"] = json!({"required": required, "content": body.describe(types)});
        }
        if self.signed {
            out["security"] = json!([{"CurioAuth": []}]);
        }
        out
    }
}

/// Routes with their description.
pub(crate) struct Api<S> {
    router: Router<S>,
    paths: Map<String, Value>,
    types: SchemaGenerator,
}

impl<S: Clone + Send + Sync + 'static> Api<S> {
    pub(crate) fn new() -> Self {
        let settings = SchemaSettings::draft2020_12().with(|s| {
            s.definitions_path = "/components/schemas".into();
            s.meta_schema = None;
        });
        Self {
            router: Router::new(),
            paths: Map::new(),
            types: settings.into_generator(),
        }
    }

    /// Serves an operation. `handler` answers to `method` alone.
    pub(crate) fn on(
        mut self,
        method: &Method,
        path: &str,
        operation: &Operation,
        handler: MethodRouter<S>,
    ) -> Self {
        let described = operation.describe(path, &mut self.types);
        let of_path = self.paths.entry(path).or_insert_with(|| json!({}));
        of_path[method.as_str().to_ascii_lowercase()] = described;
        self.router = self.router.route(path, handler);
        self
    }

    /// The routes, and the description of those that were added with [`Api::on`].
    pub(crate) fn finish(mut self) -> (Router<S>, Value) {
        let document = json!({
            "openapi": "3.1.0",
            "info": {
                "title": "Lotus Hub deals",
                "description": "MK20 deals, and uploads of pieces without a deal.",
                "version": env!("CARGO_PKG_VERSION"),
            },
            "paths": self.paths,
            "components": {
                "schemas": self.types.take_definitions(true),
                "securitySchemes": {"CurioAuth": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "Authorization",
                    "description": "`CurioAuth TYPE:ADDRESS:SIGNATURE`: TYPE is `secp256k1` or `bls`, ADDRESS the base64 of the address' bytes, SIGNATURE that of its type and its bytes. Signed is the SHA-256 of the address' bytes, the method in capitals, the path, and the minute in UTC as RFC 3339, one after the other.",
                }},
            },
        });
        (self.router, document)
    }
}
