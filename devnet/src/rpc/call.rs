//! One JSON-RPC call: its request, its arguments, its answer, in go-jsonrpc's words.

use lotus_node_client::json::{FromLotus, Lotus, ToLotus};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::ChainError;

/// Lotus' code for an error that the method itself returned.
const CALL_FAILED: i64 = 1;
const PARSE_ERROR: i64 = -32_700;
const INVALID_REQUEST: i64 = -32_600;
const METHOD_NOT_FOUND: i64 = -32_601;
const INVALID_PARAMS: i64 = -32_602;

/// A request as it arrives.
#[derive(Debug, Deserialize)]
pub(crate) struct Request {
    /// Absent in a notification, which gets no answer.
    pub(crate) id: Option<Value>,
    pub(crate) method: String,
    #[serde(default)]
    pub(crate) params: Option<Vec<Value>>,
}

impl Request {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, RpcError> {
        let value: Value = serde_json::from_slice(bytes).map_err(|e| RpcError {
            code: PARSE_ERROR,
            message: format!("unmarshaling request: {e}"),
        })?;
        serde_json::from_value(value).map_err(|e| RpcError {
            code: INVALID_REQUEST,
            message: format!("invalid request: {e}"),
        })
    }
}

/// What a failed call says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RpcError {
    pub(crate) code: i64,
    pub(crate) message: String,
}

impl RpcError {
    /// The method was called and failed.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self {
            code: CALL_FAILED,
            message: message.into(),
        }
    }

    pub(crate) fn no_method(name: &str) -> Self {
        Self {
            code: METHOD_NOT_FOUND,
            message: format!("method '{name}' not found"),
        }
    }

    pub(crate) fn no_channel(name: &str) -> Self {
        Self {
            code: METHOD_NOT_FOUND,
            message: format!("method '{name}' not supported in this mode (no out channel support)"),
        }
    }

    /// Whether the call reached its method. go-jsonrpc answers the others with HTTP 500.
    pub(crate) fn is_of_call(&self) -> bool {
        self.code == CALL_FAILED
    }
}

impl From<ChainError> for RpcError {
    fn from(e: ChainError) -> Self {
        Self::failed(e.to_string())
    }
}

/// An answer as it leaves.
pub(crate) fn response(id: &Value, result: Result<Value, RpcError>) -> Value {
    match result {
        Ok(v) => json!({"jsonrpc": "2.0", "id": id, "result": v}),
        Err(e) => json!({
            "jsonrpc": "2.0", "id": id, "error": {"code": e.code, "message": e.message}
        }),
    }
}

/// The arguments of a call, taken in order.
pub(crate) struct Args {
    method: String,
    left: std::vec::IntoIter<Value>,
    taken: usize,
}

impl Args {
    pub(crate) fn new(method: &str, params: Vec<Value>, want: usize) -> Result<Self, RpcError> {
        if params.len() != want {
            return Err(RpcError {
                code: INVALID_PARAMS,
                message: format!(
                    "wrong param count (method '{method}'): {} != {want}",
                    params.len()
                ),
            });
        }
        Ok(Self {
            method: method.to_owned(),
            left: params.into_iter(),
            taken: 0,
        })
    }

    pub(crate) fn next<T: FromLotus>(&mut self) -> Result<T, RpcError> {
        let v = self.left.next().unwrap_or(Value::Null);
        self.taken += 1;
        let v: Lotus<T> = serde_json::from_value(v).map_err(|e| RpcError {
            code: PARSE_ERROR,
            message: format!(
                "unmarshaling params for '{}' (param: {}): {e}",
                self.method, self.taken
            ),
        })?;
        Ok(v.0)
    }
}

pub(crate) fn to_json<T: ToLotus>(v: &T) -> Result<Value, RpcError> {
    serde_json::to_value(Lotus(v)).map_err(|e| RpcError::failed(e.to_string()))
}
