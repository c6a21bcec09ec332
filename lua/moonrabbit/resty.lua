--- moonrabbit inside nginx (OpenResty, or nginx with ngx_lua): nothing here blocks a worker.
--
--     init_worker_by_lua_block {
--       require "moonrabbit.resty".start { uri = "amqp://guest:guest@127.0.0.1/" }
--     }
--     location /orders {
--       content_by_lua_block {
--         local rabbit = require "moonrabbit.resty"
--         local ok, err = rabbit.publish("hello", { routing_key = "orders" })
--         ngx.status = ok and 202 or 503
--       }
--     }
--
-- `start` gives each worker one connection to publish and, if it consumes, one to consume. They are kept:
-- the worker starts before the broker is there, reconnects, and sends again what was not confirmed. Requests
-- hand their messages over through a queue of bounded size: `publish` waits for the broker's confirm,
-- `publish_async` never waits and is for every phase, log_by_lua* too.
--
-- When the worker leaves (`nginx -s reload`, `quit`), what is queued is sent and confirmed and what is being
-- handled is finished, within `exit_timeout`.
--
-- `connect` opens a connection for one request or timer alone, with the API of moonrabbit.connection. Names are
-- looked up by nginx's `resolver`, but for "localhost". Trusted certificates come from
-- `lua_ssl_trusted_certificate`. See docs/openresty.md.
-- @module moonrabbit.resty

local nginx = rawget(_G, "ngx")
if not nginx or not nginx.get_phase or not nginx.socket then
  error('moonrabbit.resty runs inside nginx with ngx_lua (OpenResty): elsewhere use require "moonrabbit"', 0)
end

if nginx.config.subsystem ~= "http" then
  error("moonrabbit.resty is for the http subsystem of nginx: in stream {} it has nothing to publish from", 0)
end

local Connection = require "moonrabbit.connection"
local Consumer = require "moonrabbit.consumer"
local Inbound = require "moonrabbit.resty.inbound"
local Outbound = require "moonrabbit.resty.outbound"
local core = require "moonrabbit.core"
local errors = require "moonrabbit.errors"
local options = require "moonrabbit.options"
local phases = require "moonrabbit.resty.phases"
local process = require "moonrabbit.resty.process"
local runtime = require "moonrabbit.runtime.resty"
local start_options = require "moonrabbit.resty.options"

local resty = {
  spawn = runtime.spawn,
  sleep = runtime.sleep,
  pcall = runtime.pcall,
  null = core.null,
  types = core.types,
  errors = errors,
}

local NAME = "moonrabbit.resty"
local argument, check, seconds = options.argument, options.check, options.seconds

-- ---- Before there are workers ------------------------------------------------------------------------

--- Throws what `start` would throw for these options: for init_by_lua*, where a mistake keeps nginx from starting,
--- and a reload from taking the place of what runs.
---@param opts string|moonrabbit.resty.StartOptions
function resty.check(opts)
  start_options.check(NAME .. ".check", opts, 2)
end

--- Throws what is wrong with the script of an app, with its file and line: for init_by_lua*, as `check` is.
---@param path string as for `consume`
function resty.check_app(path)
  argument(NAME .. ".check_app", "path", path, options.string)
  local app, problem = require("moonrabbit.resty.apps").load(path)
  if not app then error(NAME .. ".check_app: " .. problem, 0) end
end

-- ---- One connection for one request or timer --------------------------------------------------------

local function with_runtime(given, what)
  if type(given) == "string" then given = { uri = given } end
  if type(given) ~= "table" then error(what .. ": a URI or a table of options expected", 3) end
  if given.runtime ~= nil then error(what .. ": unknown option 'runtime' (this is the resty runtime)", 3) end
  local all = { runtime = runtime, reconnect = false }
  for key, value in pairs(given) do all[key] = value end
  return all
end

--- Connects, as moonrabbit.connect does, over a cosocket, for the calling request or timer alone, which must close
--- it. The option `runtime` is not for this one, and `reconnect` is false by default: a connection that came back would
--- keep its request, or timer, from ending.
---@param opts string|moonrabbit.ConnectOptions as for moonrabbit.connect
---@return moonrabbit.Connection|nil, moonrabbit.Error?
function resty.connect(opts)
  phases.check_waiting(NAME .. ".connect", nil, 2)
  local connection, err = Connection.connect(with_runtime(opts, NAME .. ".connect"), 2)
  return connection, err
end

-- ---- The client of a worker -------------------------------------------------------------------------

---@class moonrabbit.resty.Client
---@field timeout number
local Client = {}
Client.__index = Client

local default

--- Starts the client of this worker: call it once, in init_worker_by_lua*. It does not wait; the broker may come later.
--- Wrong options throw.
---@param opts string|moonrabbit.resty.StartOptions? a URI or options
---@return moonrabbit.resty.Client
function resty.start(opts)
  phases.check_init_worker(NAME .. ".start", 2)
  local given = start_options.check(NAME .. ".start", opts, 2)
  if given.default ~= false and default then
    error(NAME .. ".start was called before in this worker: a second client takes default = false", 2)
  end
  local reconnect = given.reconnect or {}
  local backoff = {
    first = reconnect.first or 0.1, factor = reconnect.factor or 2, max = reconnect.max or 10,
    jitter = reconnect.jitter or 0.2,
  }
  local function connector(role)
    local all = start_options.connect(given, role)
    local limit, heritage = all.connect_timeout, {}
    return function(most)
      all.connect_timeout = math.min(limit, most or limit)
      return Connection.connect(all, 1, nil, heritage)
    end
  end
  -- What its connections have in common.
  local function kept(role, more)
    local config = {
      name = role, connect = connector(role), backoff = backoff, exit_timeout = given.exit_timeout or 10,
      setup = given.setup,
    }
    for key, value in pairs(more or {}) do config[key] = value end
    return config
  end
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
  if given.default ~= false then default = self end
  process.mark_started()
  return self
end

-- The client that start made; throws, with what is to be done, where there is none.
local function started(what, level)
  if default then return default end
  level = level + 1
  if process.is_started() then
    error(what .. ": lua_code_cache is off, so that each request has a Lua of its own, where nothing was started:"
      .. " switch it on", level)
  end
  error(("%s: call moonrabbit.resty.start in init_worker_by_lua* first (this is %s)"):format(what, phases.current()),
    level)
end

local route_options = options.merge(options.publish, { timeout = seconds })

local function check_body(what, body, level)
  if type(body) ~= "string" then
    error(what .. ": the body must be a string, not a " .. type(body), level + 1)
  end
end

-- What is encoded here cannot be changed by its owner any more, and cannot surprise the sender.
local function route(what, opts, level)
  if opts == nil then opts = {} end
  check(what, opts, route_options, level + 1)
  local ok, made = pcall(core.route, opts, true)
  if not ok then error(what .. ": " .. tostring(made), level + 1) end
  return made
end

local empty = core.route({}, true)

local function publish(self, what, body, opts, level)
  check_body(what, body, level + 1)
  phases.check_waiting(what, "publish_async is for every phase", level + 1)
  local made = opts and route(what, opts, level + 1) or empty
  return self._outbound:publish(body, made, opts and opts.timeout or self.timeout)
end

local function publish_async(self, what, body, opts, level)
  check_body(what, body, level + 1)
  return self._outbound:publish_async(body, opts and route(what, opts, level + 1) or empty)
end

local function call(self, what, body, opts, level)
  check_body(what, body, level + 1)
  phases.check_waiting(what, nil, level + 1)
  local all = {}
  for key, value in pairs(opts or {}) do all[key] = value end
  all.timeout = all.timeout or self.timeout
  argument(what, "option 'timeout'", all.timeout, seconds, level + 1)
  return self._outbound:run(function(conn) return conn:call(body, all) end, all.timeout)
end

local function run(self, what, fn, timeout, level)
  argument(what, "fn", fn, options.callback, level + 1)
  if timeout ~= nil then argument(what, "timeout", timeout, seconds, level + 1) end
  phases.check_waiting(what, nil, level + 1)
  return self._outbound:run(fn, timeout or self.timeout)
end

-- Returns what it is given: so that the call before it is none that Lua forgets (a tail call).
local function pass(...) return ... end

--- Publishes and waits for the broker's confirm: true once a queue has the message. Call it in rewrite, access and
--- content phases and in timers. While there is no connection it waits for one.
--- err.kind: `nacked`, `unroutable`, `channel` (with the broker's code: no such exchange, not permitted), `overflow`
--- (the queue is full, or the message too large; not sent), `timeout` (the outcome is unknown, or, as the message
--- says, it was not sent), what kept the connection away (`refused`, `dns`, `tls`, `auth`, `vhost`; not sent),
--- `shutdown`.
---@param body string
---@param opts moonrabbit.PublishOptions? as for Channel:publish
---@return true|nil, moonrabbit.Error?
function Client:publish(body, opts)
  local ok, err = publish(self, "publish", body, opts, 2)
  return ok, err
end

--- Puts a message into the queue and returns: never waits, and may be called in every phase, log_by_lua* too. It is sent
--- and confirmed like any other; one that fails is counted (`stats`) and logged.
--- err.kind: `overflow`, the queue is full; `shutdown`, in the last phase of a worker: the message is not in it.
---@param body string
---@param opts moonrabbit.PublishOptions? as for Channel:publish; `timeout` has no meaning here
---@return true|nil, moonrabbit.Error?
function Client:publish_async(body, opts)
  local ok, err = publish_async(self, "publish_async", body, opts, 2)
  return ok, err
end

--- A remote call over direct reply-to, as Connection:call.
---@param body string
---@param opts moonrabbit.CallOptions
---@return moonrabbit.Message|nil reply, moonrabbit.Error?
function Client:call(body, opts)
  local reply, err = call(self, "call", body, opts, 2)
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
  return pass(run(self, "run", fn, timeout, 2))
end

---@class moonrabbit.resty.ConsumeOptions : moonrabbit.ConsumeOptions
---@field queue string|(fun(conn: moonrabbit.Connection): string|nil, moonrabbit.Error?)  the queue; or what declares it, on the connection that consumes (as an exclusive one must be), and says its name
---@field handler fun(message: moonrabbit.Message)  settles its message itself; what it throws is logged, and the message goes back after `error_delay`
---@field concurrency integer?  how many handlers run at once; 16 by default
---@field app string?           instead of all the others: the script of an app, relative to nginx's prefix

local consume_options = options.merge(Consumer.options, {
  queue = options.either(options.shortstr, options.callback), handler = options.callback,
})

-- How a handler's consumer starts, ends, and tells of its end.
local function subscription(queue, opts, handler)
  return {
    name = type(queue) == "string" and queue or "(its own)",
    start = function(conn)
      if type(queue) == "string" then return conn:consume(queue, opts, handler) end
      local name, err = queue(conn)
      if not name then
        return nil, err or errors.new { kind = "cancelled", message = "the function 'queue' named none" }
      end
      return conn:consume(name, opts, handler)
    end,
    stop = function(consumer, timeout) return consumer:cancel { timeout = timeout } end,
    watch = function(consumer, fn)
      consumer.channel:on("close", fn)
      consumer.channel:on("cancel", fn)
    end,
  }
end

-- A script that is broken is told of, and costs the worker nothing else.
local function consume_app(self, what, opts, level)
  check(what, opts, { app = options.string }, level + 1)
  local apps = require "moonrabbit.resty.apps"
  local app, problem = apps.load(opts.app)
  if not app then
    runtime.log("error", what .. ": this worker runs without the app: " .. problem)
    if self._metrics then self._metrics.metrics:ready("app " .. opts.app, function() return nil, problem end) end
    return nil, problem
  end
  local metrics, name = self._metrics, app.name
  if metrics then app:_observed_by(function(also) return metrics:observer(app, also) end) end
  self._apps[name] = apps.keep(app, self._kept(name .. ", consuming", {
    connect_publishing = self._connector(name .. ", publishing"),
    watch = metrics and metrics:connection(name .. " (consume)"),
    watch_publishing = metrics and metrics:connection(name .. " (publish)"),
  }))
  return true
end

local function consume(self, what, opts, level)
  level = level + 1
  phases.check_init_worker(what, level)
  if type(opts) == "table" and opts.app ~= nil then return consume_app(self, what, opts, level) end
  check(what, opts, consume_options, level)
  for _, name in ipairs { "queue", "handler" } do
    if not opts or opts[name] == nil then
      error(what .. ": option '" .. name .. "' is missing (or 'app', a script)", level)
    end
  end
  local rest = { concurrency = 16 }
  for key, value in pairs(opts) do
    if key ~= "queue" and key ~= "handler" then rest[key] = value end
  end
  self._inbound:add(subscription(opts.queue, rest, opts.handler))
  return true
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

-- ---- Publishers -------------------------------------------------------------------------------------

---@class moonrabbit.resty.Publisher
local Publisher = {}
Publisher.__index = Publisher

local function with(self, what, overrides, level)
  check(what, overrides, route_options, level + 1)
  local all = {}
  for key, value in pairs(self._base) do all[key] = value end
  for key, value in pairs(overrides) do all[key] = value end
  if overrides.headers and self._base.headers then
    all.headers = {}
    for key, value in pairs(self._base.headers) do all.headers[key] = value end
    for key, value in pairs(overrides.headers) do all.headers[key] = value end
  end
  return route(what, all, level + 1)
end

local function new_publisher(client, what, opts, level)
  local base = {}
  for key, value in pairs(opts or {}) do base[key] = value end
  return setmetatable({ _client = client, _base = base, _route = route(what, base, level + 1) }, Publisher)
end

--- A route that is encoded once, for the many messages that take it: its sends cost least.
---@param opts moonrabbit.PublishOptions? as for Channel:publish
---@return moonrabbit.resty.Publisher
function Client:publisher(opts)
  local publisher = new_publisher(self, "publisher", opts, 2)
  return publisher
end

--- Sends and waits for the confirm, as `publish` does.
---@param body string
---@param overrides moonrabbit.PublishOptions? for this message; headers are merged
---@return true|nil, moonrabbit.Error?
function Publisher:send(body, overrides)
  check_body("Publisher:send", body, 2)
  phases.check_waiting("Publisher:send", "send_async is for every phase", 2)
  local client = self._client or started("Publisher:send", 2)
  local made = overrides and with(self, "Publisher:send", overrides, 2) or self._route
  local ok, err = client._outbound:publish(body, made,
    overrides and overrides.timeout or self._base.timeout or client.timeout)
  return ok, err
end

--- Puts a message into the queue and returns, as `publish_async` does.
---@param body string
---@param overrides moonrabbit.PublishOptions? for this message; headers are merged
---@return true|nil, moonrabbit.Error?
function Publisher:send_async(body, overrides)
  check_body("Publisher:send_async", body, 2)
  local client = self._client or started("Publisher:send_async", 2)
  local made = overrides and with(self, "Publisher:send_async", overrides, 2) or self._route
  local ok, err = client._outbound:publish_async(body, made)
  return ok, err
end

-- ---- The default client's ---------------------------------------------------------------------------

--- As Client:publish, by the client that `start` made.
---@param body string
---@param opts moonrabbit.PublishOptions? as for Channel:publish
---@return true|nil, moonrabbit.Error?
function resty.publish(body, opts)
  local ok, err = publish(started(NAME .. ".publish", 2), NAME .. ".publish", body, opts, 2)
  return ok, err
end

--- As Client:publish_async, by the client that `start` made.
---@param body string
---@param opts moonrabbit.PublishOptions? as for Channel:publish
---@return true|nil, moonrabbit.Error?
function resty.publish_async(body, opts)
  local ok, err = publish_async(started(NAME .. ".publish_async", 2), NAME .. ".publish_async", body, opts, 2)
  return ok, err
end

--- As Client:call, by the client that `start` made.
---@param body string
---@param opts moonrabbit.CallOptions
---@return moonrabbit.Message|nil reply, moonrabbit.Error?
function resty.call(body, opts)
  local reply, err = call(started(NAME .. ".call", 2), NAME .. ".call", body, opts, 2)
  return reply, err
end

--- As Client:run, by the client that `start` made.
---@param fn fun(conn: moonrabbit.Connection): any
---@param timeout number? seconds that the caller waits
---@return any ... what fn returned
function resty.run(fn, timeout)
  return pass(run(started(NAME .. ".run", 2), NAME .. ".run", fn, timeout, 2))
end

--- As Client:consume, by the client that `start` made.
---@param opts moonrabbit.resty.ConsumeOptions
---@return true|nil, string? problem
function resty.consume(opts)
  phases.check_init_worker(NAME .. ".consume", 2)
  local ok, problem = consume(started(NAME .. ".consume", 2), NAME .. ".consume", opts, 2)
  return ok, problem
end

--- As Client:publisher, by the client that `start` makes, before or after.
---@param opts moonrabbit.PublishOptions? as for Channel:publish
---@return moonrabbit.resty.Publisher
function resty.publisher(opts)
  local publisher = new_publisher(nil, NAME .. ".publisher", opts, 2)
  return publisher
end

--- As Client:stats, by the client that `start` made.
---@return table
function resty.stats()
  local all = started(NAME .. ".stats", 2):stats()
  return all
end

-- ---- Requests ---------------------------------------------------------------------------------------

--- The body of the current request, "" when it has none. nginx writes a body larger than
--- `client_body_buffer_size` to a file, which could only be read by blocking the worker: that is an error of kind
--- `overflow`.
---@return string|nil, moonrabbit.Error?
function resty.request_body()
  phases.check_waiting(NAME .. ".request_body", nil, 2)
  ngx.req.read_body()
  local body = ngx.req.get_body_data()
  if body then return body end
  if not ngx.req.get_body_file() then return "" end
  return nil, errors.new {
    kind = "overflow", temporary = false,
    message = "nginx has buffered the request body to disk: raise client_body_buffer_size to client_max_body_size",
  }
end

return resty
