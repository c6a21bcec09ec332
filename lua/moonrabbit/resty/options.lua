--- What `moonrabbit.resty.start` can be told, and what is made of it.
-- @module moonrabbit.resty.options

local Backoff = require "moonrabbit.connection.backoff"
local Connection = require "moonrabbit.connection"
local cluster = require "moonrabbit.cluster"
local connection_options = require "moonrabbit.connection.options"
local options = require "moonrabbit.options"
local runtime = require "moonrabbit.runtime.resty"
local tls = require "moonrabbit.runtime.resty.tls"

local check, seconds = options.check, options.seconds

local resty_options = {}

---@class moonrabbit.resty.StartOptions : moonrabbit.ConnectOptions
---@field timeout number?       seconds that publish, call and run wait unless they say otherwise; 5 by default
---@field connect_timeout number? seconds for an attempt to connect; 5 by default
---@field entries integer?      the most messages that may be queued or unconfirmed in this worker; 10000 by default
---@field bytes integer?        the most bytes of bodies in them; 16 MiB by default
---@field linger number?        seconds that messages which nobody waits for may gather before they are sent; 0.005 by default
---@field calls integer?        the most functions (`run`, `call`) that may be under way at once; 1000 by default
---@field setup (fun(conn: moonrabbit.Connection): true|nil, moonrabbit.Error?)?  declares what is needed, on each new connection before it is used
---@field reconnect moonrabbit.resty.ReconnectOptions? how soon a lost connection is tried again
---@field exit_timeout number?  seconds that a worker which is to leave stays for its confirms and handlers; 10 by default
---@field metrics string?       the `lua_shared_dict` for metrics: moonrabbit.resty.metrics. Without it nothing is measured
---@field default boolean?      false: a client besides the one that the functions of this module use; true by default

---@class moonrabbit.resty.ReconnectOptions
---@field first number?   seconds before the first attempt; 0.1 by default
---@field factor number?  by which each wait is longer than the one before; 2 by default
---@field max number?     seconds, the longest wait; 10 by default
---@field jitter number?  0 to 1, the part of each wait that is left to chance; 0.2 by default

local reconnect_options = {
  first = seconds, factor = options.number(1), max = seconds, jitter = Backoff.options.jitter,
}

local own_options = {
  entries = options.integer(1, 10000000),
  bytes = options.integer(1, 9007199254740991),
  linger = seconds,
  calls = options.integer(1, 100000),
  setup = options.callback,
  reconnect = options.table,
  exit_timeout = seconds,
  metrics = options.string,
  default = options.boolean,
}

local start_options = options.merge(Connection.options, own_options)

local function of_connections(given)
  local all = {}
  for key, value in pairs(given) do
    if not own_options[key] then all[key] = value end
  end
  return all
end

--- Throws for what can be known to be wrong before there is a broker.
---@param what string who asks
---@param given string|moonrabbit.resty.StartOptions?
---@param level integer of the caller
---@return table given
function resty_options.check(what, given, level)
  level = level + 1
  if type(given) == "string" then given = { uri = given } end
  if given ~= nil and type(given) == "table" and given.runtime ~= nil then
    error(what .. ": unknown option 'runtime' (this is the resty runtime)", level)
  end
  given = check(what, given, start_options, level)
  if given.reconnect then check(what .. ": reconnect", given.reconnect, reconnect_options, level) end
  connection_options.check(of_connections(given), level)
  local dict = given.metrics
  if dict and not ngx.shared[dict] then
    error(("%s: option 'metrics': there is no dictionary '%s': nginx needs `lua_shared_dict %s 1m;`"):format(what, dict,
      dict), level)
  end
  local source = cluster.source(given, { runtime = runtime, log = runtime.log }, level)
  for _, target in ipairs(source.targets) do
    if target.tls then
      local ok, identity, problem = pcall(tls.prepare, target.tls)
      if not ok then error(what .. ": " .. tostring(identity), level) end
      if identity == nil then error(what .. ": " .. problem, level) end
    end
  end
  return given
end

--- What a kept connection is opened with: everything else is ours.
---@param given table of `check`
---@param role string what it is for, in its name
---@return moonrabbit.ConnectOptions
function resty_options.connect(given, role)
  local all = of_connections(given)
  all.runtime, all.timeout, all.connect_timeout = runtime, all.timeout or 5, all.connect_timeout or 5
  all.name = ("%s (%s)"):format(given.name or ("nginx worker " .. tostring(ngx.worker.id() or 0)), role)
  all.reconnect = false -- keeper.lua does that, in fresh timers
  return all
end

return resty_options
