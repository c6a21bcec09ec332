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

local Client = require "moonrabbit.resty.client"
local Publisher = require "moonrabbit.resty.publisher"
local consume = require "moonrabbit.resty.consuming"
local core = require "moonrabbit.core"
local default = require "moonrabbit.resty.default"
local errors = require "moonrabbit.errors"
local options = require "moonrabbit.options"
local phases = require "moonrabbit.resty.phases"
local process = require "moonrabbit.resty.process"
local request = require "moonrabbit.resty.request"
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
local started = default.client

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
  options.argument(NAME .. ".check_app", "path", path, options.string)
  local app, problem = require("moonrabbit.resty.apps").load(path)
  if not app then error(NAME .. ".check_app: " .. problem, 0) end
end

-- ---- The client of a worker -------------------------------------------------------------------------

--- Starts the client of this worker: call it once, in init_worker_by_lua*. It does not wait; the broker may come later.
--- Wrong options throw.
---@param opts string|moonrabbit.resty.StartOptions? a URI or options
---@return moonrabbit.resty.Client
function resty.start(opts)
  phases.check_init_worker(NAME .. ".start", 2)
  local given = start_options.check(NAME .. ".start", opts, 2)
  if given.default ~= false and default.made then
    error(NAME .. ".start was called before in this worker: a second client takes default = false", 2)
  end
  local client = Client._new(given)
  if given.default ~= false then default.made = client end
  process.mark_started()
  return client
end

-- Returns what it is given: so that the call before it is none that Lua forgets (a tail call).
local function pass(...) return ... end

--- As Client:publish, by the client that `start` made.
---@param body string
---@param opts moonrabbit.PublishOptions? as for Channel:publish
---@return true|nil, moonrabbit.Error?
function resty.publish(body, opts)
  local ok, err = started(NAME .. ".publish", 2):_publish(NAME .. ".publish", body, opts, 2)
  return ok, err
end

--- As Client:publish_async, by the client that `start` made.
---@param body string
---@param opts moonrabbit.PublishOptions? as for Channel:publish
---@return true|nil, moonrabbit.Error?
function resty.publish_async(body, opts)
  local ok, err = started(NAME .. ".publish_async", 2):_publish_async(NAME .. ".publish_async", body, opts, 2)
  return ok, err
end

--- As Client:call, by the client that `start` made.
---@param body string
---@param opts moonrabbit.CallOptions
---@return moonrabbit.Message|nil reply, moonrabbit.Error?
function resty.call(body, opts)
  local reply, err = started(NAME .. ".call", 2):_call(NAME .. ".call", body, opts, 2)
  return reply, err
end

--- As Client:run, by the client that `start` made.
---@param fn fun(conn: moonrabbit.Connection): any
---@param timeout number? seconds that the caller waits
---@return any ... what fn returned
function resty.run(fn, timeout)
  return pass(started(NAME .. ".run", 2):_run(NAME .. ".run", fn, timeout, 2))
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
  local publisher = Publisher._new(nil, NAME .. ".publisher", opts, 2)
  return publisher
end

--- As Client:stats, by the client that `start` made.
---@return table
function resty.stats()
  local all = started(NAME .. ".stats", 2):stats()
  return all
end

-- ---- One request or timer ---------------------------------------------------------------------------

--- Connects, as moonrabbit.connect does, over a cosocket, for the calling request or timer alone, which must close
--- it. The option `runtime` is not for this one, and `reconnect` is false by default: a connection that came back would
--- keep its request, or timer, from ending.
---@param opts string|moonrabbit.ConnectOptions as for moonrabbit.connect
---@return moonrabbit.Connection|nil, moonrabbit.Error?
function resty.connect(opts)
  local connection, err = request.connect(NAME .. ".connect", opts, 2)
  return connection, err
end

--- The body of the current request, "" when it has none. nginx writes a body larger than
--- `client_body_buffer_size` to a file, which could only be read by blocking the worker: that is an error of kind
--- `overflow`.
---@return string|nil, moonrabbit.Error?
function resty.request_body()
  local body, err = request.body(NAME .. ".request_body", 2)
  return body, err
end

return resty
