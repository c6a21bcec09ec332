--- What the world can do to a connection, as values.
--
-- Every function of moonrabbit that can fail for a reason outside the program returns `nil, err`
-- with an `err` of this class. Mistakes of the program (a wrong type, an unknown option, settling
-- a message twice) throw a string instead.
--
-- | kind | what happened | temporary |
-- | --- | --- | --- |
-- | `refused` | nothing accepts connections there | yes |
-- | `dns` | the name has no address | as the resolver says |
-- | `timeout` | no answer in time; the outcome is unknown | yes |
-- | `tls` | certificate, host name or handshake refused | no |
-- | `auth` | user, password or mechanism refused | no |
-- | `vhost` | the vhost is unknown or not permitted | no |
-- | `protocol` | one side broke the protocol | no |
-- | `closed` | the connection or channel is closed | unless closed by this side |
-- | `channel` | the broker closed the channel: see `code` | only 405, 506 and 541 |
-- | `nacked` | the broker refused a publish | yes |
-- | `unroutable` | no queue takes the message | no |
-- | `blocked` | the broker is short of memory or disk; nothing was sent | yes |
-- | `overflow` | the window, the buffer or a size limit is exceeded; nothing was sent | but for sizes |
-- | `outbox` | an outbox cannot store or read messages | unless the file is damaged or may not be written |
-- | `cancelled` | the consumer was cancelled | when the broker did it |
-- | `shutdown` | the program is stopping | no |
-- | `http` | the management API refuses: see `code`, an HTTP status | only 408, 429 and 5xx |
-- @module moonrabbit.errors

---@alias moonrabbit.ErrorKind "refused"|"timeout"|"dns"|"tls"|"auth"|"vhost"|"protocol"|"closed"|"channel"|"nacked"|"unroutable"|"blocked"|"cancelled"|"overflow"|"outbox"|"shutdown"|"http"

---@class moonrabbit.Error
---@field kind moonrabbit.ErrorKind  one of the table above
---@field message string      one sentence, without secrets
---@field code integer?       AMQP reply code, e.g. 404 (https://www.rabbitmq.com/amqp-0-9-1-reference#constants); an HTTP status from the management API
---@field class integer?      AMQP class id of the method complained about
---@field method integer?     AMQP method id of the method complained about
---@field temporary boolean   whether trying again can help
---@field endpoint string?    "host:port"
---@field strategy ("fixed"|"adaptive"|"consecutive")?  of a `timeout` that ended a connection: what found the broker silent (moonrabbit.health)
---@field failed table[]?     of `wait_for_confirms`: { seq, outcome, err } for each publish that failed
---@field unsent boolean?     of Publisher:send: the message was never sent, and is not going to be
---@field pending integer?    of `wait_for_confirms`: how many are not settled yet
local Error = {}
Error.__index = Error
Error.__name = "moonrabbit.Error"

function Error.__tostring(err)
  local text = tostring(err.message)
  if err.endpoint and not text:find(err.endpoint, 1, true) then
    return text .. " [" .. err.endpoint .. "]"
  end
  return text
end

function Error.__concat(a, b)
  return tostring(a) .. tostring(b)
end

local errors = { Error = Error }

-- Whether trying again can help, where neither the code nor the caller knows better.
local temporary_kinds = {
  refused = true, timeout = true, dns = true, closed = true, nacked = true, blocked = true, overflow = true,
}

-- connection-forced, resource-locked (an exclusive queue of a connection that is about to be noticed
-- dead), resource-error, internal-error.
local temporary_codes = { [320] = true, [405] = true, [506] = true, [541] = true }

local method_names = {
  [10] = { [10] = "start", [11] = "start-ok", [30] = "tune", [31] = "tune-ok", [40] = "open", [50] = "close",
    [70] = "update-secret" },
  [20] = { [10] = "open", [20] = "flow", [40] = "close" },
  [40] = { [10] = "declare", [20] = "delete", [30] = "bind", [40] = "unbind" },
  [50] = { [10] = "declare", [20] = "bind", [30] = "purge", [40] = "delete", [50] = "unbind" },
  [60] = { [10] = "qos", [20] = "consume", [30] = "cancel", [40] = "publish", [70] = "get", [80] = "ack",
    [90] = "reject", [100] = "recover-async", [110] = "recover", [120] = "nack" },
  [85] = { [10] = "select" },
  [90] = { [10] = "select", [20] = "commit", [30] = "rollback" },
}
local class_names = {
  [10] = "connection", [20] = "channel", [40] = "exchange", [50] = "queue", [60] = "basic", [85] = "confirm",
  [90] = "tx",
}

--- The AMQP name of a method, e.g. "queue.declare" for 50, 10.
---@param class integer?
---@param method integer?
---@return string?
function errors.method_name(class, method)
  local name = class_names[class]
  if not name then return nil end
  local methods = method_names[class]
  return name .. "." .. (methods[method] or tostring(method))
end

--- Makes an error. `temporary` is filled in from the code or the kind where it is nil.
---@param fields table the fields of an Error
---@return moonrabbit.Error
function errors.new(fields)
  if fields.temporary == nil then
    if fields.kind == "channel" then
      fields.temporary = temporary_codes[fields.code] or false
    else
      fields.temporary = temporary_kinds[fields.kind] or temporary_codes[fields.code] or false
    end
  end
  return setmetatable(fields, Error)
end

--- An error that may be changed, where others hold the given one.
---@package
---@generic T: table
---@param err T
---@return T
function errors.copy(err)
  local copy = {}
  for name, value in pairs(err) do copy[name] = value end
  return setmetatable(copy, getmetatable(err))
end

--- Makes an error from what the engine reports: { kind, code, text, class, method }.
---@package
---@param report table
---@param endpoint string?
---@return moonrabbit.Error
function errors.from_engine(report, endpoint)
  local kind = report.kind
  if kind == "memory" then kind = "overflow" end
  local code, class, method = report.code, report.class, report.method
  local message = report.text
  if message == nil or message == "" then message = kind end
  local name = errors.method_name(class, method)
  if code then
    message = message .. " (" .. code .. (name and ", " .. name or "") .. ")"
  end
  local temporary
  -- A broker that is shutting down or has run out of something says so with a code.
  if code and temporary_codes[code] then temporary = true end
  return errors.new {
    kind = kind, message = message, code = code, class = class, method = method,
    temporary = temporary, endpoint = endpoint,
  }
end

--- Whether a value is an error of moonrabbit.
---@param value any
---@return boolean
function errors.is(value)
  return getmetatable(value) == Error
end

return errors
