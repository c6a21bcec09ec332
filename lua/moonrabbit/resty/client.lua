--- The client of a worker: what publishes, what consumes, and what its users call.
-- @module moonrabbit.resty.client

local Connection = require "moonrabbit.connection"
local Inbound = require "moonrabbit.resty.inbound"
local Outbound = require "moonrabbit.resty.outbound"
local Publisher = require "moonrabbit.resty.publisher"
local consume = require "moonrabbit.resty.consuming"
local options = require "moonrabbit.options"
local phases = require "moonrabbit.resty.phases"
local routes = require "moonrabbit.resty.routes"
local start_options = require "moonrabbit.resty.options"

local argument, seconds = options.argument, options.seconds
local check_body, route, empty = routes.check_body, routes.route, routes.empty

---@class moonrabbit.resty.Client
---@field timeout number
local Client = {}
Client.__index = Client

-- ---- Its parts --------------------------------------------------------------------------------------

local function backoff_of(given)
  local reconnect = given.reconnect or {}
  return {
    first = reconnect.first or 0.1, factor = reconnect.factor or 2, max = reconnect.max or 10,
    jitter = reconnect.jitter or 0.2,
  }
end

-- What opens its connections.
local function connector_of(given)
  return function(role)
    local all = start_options.connect(given, role)
    local heritage = {}
    return function() return Connection.connect(all, 1, heritage) end
  end
end

-- What its connections have in common.
local function kept_of(given, connector)
  local backoff = backoff_of(given)
  return function(role, more)
    local config = {
      name = role, connect = connector(role), backoff = backoff, exit_timeout = given.exit_timeout or 10,
      setup = given.setup,
    }
    for key, value in pairs(more or {}) do config[key] = value end
    return config
  end
end

-- Begins to connect; given are checked options.
function Client._new(given)
  local connector = connector_of(given)
  local kept = kept_of(given, connector)
  local metrics, label = given.metrics and require("moonrabbit.resty.metrics").open(given.metrics), given.name or "main"
  local function watched(role) return metrics and metrics:connection(label .. " (" .. role .. ")") or nil end
  local self = setmetatable({
    timeout = given.timeout or 5, _kept = kept, _connector = connector, _apps = {}, _metrics = metrics,
  }, Client)
  self._outbound = Outbound.new(kept("publishing", {
    entries = given.entries or 10000, bytes = given.bytes or 16 * 1024 * 1024, linger = given.linger or 0.005,
    calls = given.calls or 1000, watch = watched "publish",
  }))
  if metrics then metrics:outbound(self._outbound, label) end
  self._inbound = Inbound.new(kept("consuming", { watched = function() return watched "consume" end }))
  return self
end

-- ---- For its own methods, and for the functions of moonrabbit.resty ---------------------------------

--- what: who asks; level: of the caller, for mistakes.
function Client:_publish(what, body, opts, level)
  check_body(what, body, level + 1)
  phases.check_waiting(what, "publish_async is for every phase", level + 1)
  local made = opts and route(what, opts, level + 1) or empty
  return self._outbound:publish(body, made, opts and opts.timeout or self.timeout)
end

function Client:_publish_async(what, body, opts, level)
  check_body(what, body, level + 1)
  return self._outbound:publish_async(body, opts and route(what, opts, level + 1) or empty)
end

function Client:_call(what, body, opts, level)
  check_body(what, body, level + 1)
  phases.check_waiting(what, nil, level + 1)
  if opts ~= nil then argument(what, "opts", opts, options.table, level + 1) end
  local all = {}
  for key, value in pairs(opts or {}) do all[key] = value end
  all.timeout = all.timeout or self.timeout
  argument(what, "option 'timeout'", all.timeout, seconds, level + 1)
  return self._outbound:run(function(conn) return conn:call(body, all) end, all.timeout)
end

function Client:_run(what, fn, timeout, level)
  argument(what, "fn", fn, options.callback, level + 1)
  if timeout ~= nil then argument(what, "timeout", timeout, seconds, level + 1) end
  phases.check_waiting(what, nil, level + 1)
  return self._outbound:run(fn, timeout or self.timeout)
end

-- ---- Its methods ------------------------------------------------------------------------------------

-- Returns what it is given: so that the call before it is none that Lua forgets (a tail call).
local function pass(...) return ... end

--- Publishes and waits for the broker's confirm: true once a queue has the message. Call it in rewrite, access and
--- content phases and in timers. While there is no connection it waits for one.
--- err.kind: `nacked`, `unroutable`, `channel` (with the broker's code: no such exchange, not permitted), `overflow`
--- (the queue is full, or the message too large; not sent), `timeout` (the outcome is unknown, or, as the message
--- says, it was not sent), what kept the connection away (`refused`, `dns`, `tls`, `auth`, `vhost`; not sent),
--- `blocked` (the broker is short of memory or disk space, or a standby site is held; not sent), `shutdown`.
---@param body string
---@param opts moonrabbit.PublishOptions? as for Channel:publish
---@return true|nil, moonrabbit.Error?
function Client:publish(body, opts)
  local ok, err = self:_publish("publish", body, opts, 2)
  return ok, err
end

--- Puts a message into the queue and returns: never waits, and may be called in every phase, log_by_lua* too. It is sent
--- and confirmed like any other; one that fails is counted (`stats`) and logged.
--- err.kind: `overflow`, the queue is full; `shutdown`, in the last phase of a worker: the message is not in it.
---@param body string
---@param opts moonrabbit.PublishOptions? as for Channel:publish; `timeout` has no meaning here
---@return true|nil, moonrabbit.Error?
function Client:publish_async(body, opts)
  local ok, err = self:_publish_async("publish_async", body, opts, 2)
  return ok, err
end

--- A remote call over direct reply-to, as Connection:call.
---@param body string
---@param opts moonrabbit.CallOptions
---@return moonrabbit.Message|nil reply, moonrabbit.Error?
function Client:call(body, opts)
  local reply, err = self:_call("call", body, opts, 2)
  return reply, err
end

--- Runs fn(conn) where this worker's publishing connection lives, and returns what it returns: to declare a queue,
--- to look into one. It runs beside other requests' work, and must not close the connection. What fn throws is
--- thrown here.
--- err.kind as for `publish`, or what fn returned.
---@param fn fun(conn: moonrabbit.Connection): any  may wait
---@param timeout number? seconds that the caller waits; fn itself is not stopped
---@return any ... what fn returned
function Client:run(fn, timeout)
  return pass(self:_run("run", fn, timeout, 2))
end

--- Consumes in this worker, for as long as it runs: call it in init_worker_by_lua*, after `start`. Each worker has a
--- consumer of its own. Handlers run in a timer, `concurrency` at once, and may use cosockets.
---
--- `consume { app = "orders.lua" }` runs the script of an app: routes, retries, dead letters and the rest, as `moonrabbit
--- run` does. nil, problem: the script is broken; the log says so too, and nothing else fails for it.
---@param opts moonrabbit.resty.ConsumeOptions
---@return true|nil, string? problem
function Client:consume(opts)
  local ok, problem = consume(self, "consume", opts, 2)
  return ok, problem
end

--- What this worker has published and consumed, and what is going on. `state` is "open" or "connecting", `reason` why
--- it is not open; counters since the worker began: `published` (put into the queue), `confirmed`, `failed` (by
--- err.kind), `overflows` (not taken), `timeouts` (whose callers gave up), `resent`, `sessions`; and as of now `queued`
--- (not sent yet), `in_flight` (not confirmed yet), `bytes` (of bodies in both), `calls`, `consuming` ("open",
--- "connecting", or nil), and `apps`: the state of each by its name, "running" when it is well.
---@return table
function Client:stats()
  local all = self._outbound:stats()
  local keeper = self._inbound.keeper
  all.consuming = keeper and (keeper.state == "open" and "open" or "connecting") or nil
  all.apps = {}
  for name, kept in pairs(self._apps) do all.apps[name] = kept.app.state end
  return all
end

--- A route that is encoded once, for the many messages that take it: its sends cost least.
---@param opts moonrabbit.PublishOptions? as for Channel:publish
---@return moonrabbit.resty.Publisher
function Client:publisher(opts)
  local publisher = Publisher._new(self, "publisher", opts, 2)
  return publisher
end

return Client
