--- W3C trace context: `traceparent` and `tracestate`, passed on from a message to what is published because of it.
--
-- While a handler of an app runs, what its task publishes (by the app, a channel, a Publisher, a call) gets the trace
-- of the message that it handles: the same trace id, a parent id of this handling, which is the same for all that it
-- publishes, and the message's `tracestate`. Headers that the caller sets stay as they are. Elsewhere, in a task that the
-- handler spawned or a consumer without an app, `msg:trace()` gives the headers:
--
--     channel:publish(body, { routing_key = "audit", headers = msg:trace() })
--
-- A message without a valid `traceparent` has no trace, and none is begun. `mr.app { trace = false }` leaves all
-- headers alone. Where no app with traces runs, a publish costs the look at one field.
--
-- https://www.w3.org/TR/trace-context/
-- @module moonrabbit.trace

local core = require "moonrabbit.core"
local ids = require "moonrabbit.publisher.ids"

local key_without, type = core.key_without, type

local trace = {
  --- Whether handlers may run whose publishes carry a trace.
  ---@package
  on = false,
}

-- ---- The headers ------------------------------------------------------------------------------------

--- Bytes of `tracestate` that are passed on: whole entries, as many as fit.
local MOST_STATE = 512

---@class moonrabbit.TraceParent
---@field trace_id string   32 hexadecimal digits
---@field parent_id string  16 of them
---@field flags integer     1: sampled; 2: the trace id is random

--- Takes a `traceparent` apart; nil when it is none. Of a version to come what version 00 has is read.
---@param text any
---@return moonrabbit.TraceParent?
function trace.parse(text)
  if type(text) ~= "string" or #text < 55 then return nil end
  local version, trace_id, parent_id, flags = text:match "^([%da-f][%da-f])%-([%da-f]+)%-([%da-f]+)%-([%da-f][%da-f])"
  if not version or version == "ff" or #trace_id ~= 32 or #parent_id ~= 16 then return nil end
  if #text > 55 and (version == "00" or text:sub(56, 56) ~= "-") then return nil end
  if not trace_id:find "[^0]" or not parent_id:find "[^0]" then return nil end
  return { trace_id = trace_id, parent_id = parent_id, flags = tonumber(flags, 16) % 4 }
end

-- A tracestate to pass on; nil for none.
local function state_of(text)
  if type(text) ~= "string" or text == "" or text:find "[^\t\32-\126]" then return nil end
  while #text > MOST_STATE do
    text = text:match "^(.*)," -- without its last entry
    if not text then return nil end
  end
  return text
end

-- ---- Parent ids -------------------------------------------------------------------------------------

local high, low

-- Eight bytes that no other process gives, and this one not twice.
local function new_id()
  if not high then
    local digits = ids.prefix()
    high, low = tonumber(digits:sub(1, 8), 16), tonumber(digits:sub(9, 16), 16)
  end
  low = (low + 2654435769) % 4294967296 -- odd: all numbers come before one comes again
  if low == 0 then high = (high + 1) % 4294967296 end
  if low == 0 and high == 0 then return new_id() end
  return ("%08x%08x"):format(high, low)
end

-- ---- The trace of a message -------------------------------------------------------------------------

-- message -> { traceparent, tracestate } of what is published because of it
local handed_on = setmetatable({}, { __mode = "k" })

local function may_have_trace(message)
  return type(message) ~= "userdata" or not key_without(message, "traceparent")
end

local function find(message)
  local found = handed_on[message]
  if found then return found end
  if not may_have_trace(message) then return nil end
  local headers = message.headers
  local parent = type(headers) == "table" and trace.parse(headers.traceparent)
  if not parent then return nil end
  found = {
    traceparent = ("00-%s-%s-%02x"):format(parent.trace_id, new_id(), parent.flags),
    tracestate = state_of(headers.tracestate),
  }
  handed_on[message] = found
  return found
end

--- The headers for what is published because of a message, the same ones each time; nil where it has no valid
--- `traceparent`. Also a method: `msg:trace()`.
---@param message moonrabbit.Message
---@return { traceparent: string, tracestate: string? }|nil
function trace.of(message)
  local found = find(message)
  return found and { traceparent = found.traceparent, tracestate = found.tracestate } or nil
end

-- ---- What is being handled --------------------------------------------------------------------------

-- task -> the runner's job
local handling = setmetatable({}, { __mode = "kv" })

--- For the runner: `handling[task] = job` before each run.
---@package
---@return table<any, table> handling
function trace.follow()
  trace.on = true
  return handling
end

-- The trace of what the running task handles. A batch has many, so none.
local function current(runtime)
  local task = runtime.current and runtime.current()
  local job = task ~= nil and handling[task] or nil
  if not job or job.over or job.task ~= task or job.batch or not job.message then return nil end
  return find(job.message)
end

--- The options of a publish, with the trace of the message that the running task handles; the same options where there
--- is none, or where they have one already. To be asked only while `trace.on`.
---@package
---@param runtime table
---@param opts table?
---@return table?
function trace.add(runtime, opts)
  local found = current(runtime)
  if not found then return opts end
  local headers = {}
  if opts ~= nil then
    if type(opts) ~= "table" then return opts end -- a mistake: its own check names it
    local given = opts.headers
    if given ~= nil and (type(given) ~= "table" or given.traceparent ~= nil) then return opts end
    for name, value in pairs(given or {}) do headers[name] = value end
  end
  headers.traceparent = found.traceparent
  if headers.tracestate == nil then headers.tracestate = found.tracestate end
  local all = {}
  for name, value in pairs(opts or {}) do all[name] = value end
  all.headers = headers
  return all
end

--- The headers to set in a copy of a message that is sent on by a handler's wish; `set` itself where it has a trace, or
--- where the message has none to pass on.
---@package
---@param message moonrabbit.Message
---@param set table?       headers that are set anyway
---@param remove string[]? headers that are left out
---@return table?
function trace.renew(message, set, remove)
  if set and set.traceparent ~= nil then return set end
  for _, name in ipairs(remove or {}) do
    if name == "traceparent" then return set end
  end
  local found = find(message)
  if not found then return set end
  local all = {}
  for name, value in pairs(set or {}) do all[name] = value end
  all.traceparent = found.traceparent
  return all
end

return trace
