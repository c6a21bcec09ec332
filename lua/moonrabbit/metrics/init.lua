--- Metrics: what a client and an app do, for Prometheus.
--
--     local mr = require "moonrabbit"
--     local metrics = mr.metrics.new()
--     local app = mr.app { name = "orders", observer = metrics:observer(), … }
--     assert(mr.metrics.serve { metrics = metrics })  -- http://127.0.0.1:9419/metrics
--
-- docs/observability.md lists every metric. Labels are names of queues, connections, publishers and routes, and words
-- of our own; never a message's content.
-- @module moonrabbit.metrics

local Registry = require "moonrabbit.metrics.registry"
local families = require "moonrabbit.metrics.families"
local observer = require "moonrabbit.metrics.observer"
local options = require "moonrabbit.options"
local sum = require "moonrabbit.metrics.sum"

---@class moonrabbit.Metrics
---@field registry moonrabbit.metrics.Registry  for metrics of your own
local Metrics = {}
Metrics.__index = Metrics

local metrics = { Registry = Registry, sum = sum.sum, lasting = sum.lasting }

---@class moonrabbit.MetricsOptions
---@field max_series integer?  series of each metric; past them label values become "other". 200 by default
---@field log fun(level: string, text: string)?

--- All the metrics, at zero.
---@param opts moonrabbit.MetricsOptions?
---@return moonrabbit.Metrics
function metrics.new(opts)
  opts = options.check("metrics.new", opts, { max_series = options.integer(1, 1000000), log = options.callback })
  local registry = Registry.new(opts)
  local all = families.declare(registry)
  return setmetatable({
    registry = registry, families = all, checks = { ready = {}, health = {} }, _seen = {},
    _connections = require("moonrabbit.metrics.connections").new(all, registry),
    _watch_runner = observer.runners(all, registry),
  }, Metrics)
end

--- For the option `observer` of mr.app.
---@param also table? another observer, which hears the same
---@return table
function Metrics:observer(also)
  return observer.new(self.families, self._watch_runner, also)
end

--- Watches a connection, until it is closed by this side. Several of one name are added up.
---@param connection moonrabbit.Connection
---@param name string? the label `connection`; "main" by default
---@return function off stops watching
function Metrics:watch(connection, name)
  if name ~= nil then options.argument("Metrics:watch", "name", name, options.shortstr) end
  return self._connections:watch(connection, name or "main")
end

--- The publisher, measured: use it instead.
---@param publisher moonrabbit.Publisher
---@param name string? the label `publisher`; "main" by default
---@return moonrabbit.Publisher
function Metrics:publisher(publisher, name)
  if name ~= nil then options.argument("Metrics:publisher", "name", name, options.shortstr) end
  return require("moonrabbit.metrics.publisher").new(publisher, name or "main", self.families, self.registry)
end

local function add_check(list, name, check)
  list[#list + 1] = { name = name, check = check }
  return function()
    for i = #list, 1, -1 do
      if list[i].name == name and list[i].check == check then table.remove(list, i) end
    end
  end
end

--- Adds a check to `/readyz`: work may come. It must not wait.
---@param name string
---@param check fun(): boolean|nil, string?  true, or nil and why not
---@return function off
function Metrics:ready(name, check) return add_check(self.checks.ready, name, check) end

--- Adds a check to `/healthz`: the process is to be left alone. It must not wait.
---@param name string
---@param check fun(): boolean|nil, string?  true, or nil and why not
---@return function off
function Metrics:healthy(name, check) return add_check(self.checks.health, name, check) end

local function connection_is_ready(connection)
  local state, reason = connection:state()
  if state == "open" then return true end
  return nil, state .. (reason and ": " .. tostring(reason) or "")
end

--- Puts the series of an app that has started on the page, at zero.
---@package
---@param app moonrabbit.App
function Metrics:prepare(app)
  for _, runner in ipairs(app.runners) do
    observer.prepare(self.families, runner.queue)
    for _, canary in ipairs(runner.canaries) do self.families.canary_rollbacks_total:with(canary.name) end
  end
end

--- Looks at the ladders of an app that has started, every so often: what waits, what is stuck, what is orphaned.
---@param app moonrabbit.App
---@param opts moonrabbit.LadderWatchOptions?
---@return function off stops looking, and takes its series off the page
function Metrics:watch_ladders(app, opts)
  local ladders = require "moonrabbit.metrics.ladders"
  opts = options.check("Metrics:watch_ladders", opts, ladders.options)
  return ladders.watch(self.families, app, opts, self._seen)
end

--- Watches the two connections of an app that has started, and its ladders, and makes `/readyz` tell whether it runs.
---@param app moonrabbit.App
---@param opts moonrabbit.LadderWatchOptions?
---@return function off
function Metrics:watch_app(app, opts)
  local offs = { self:watch_ladders(app, opts) }
  self:prepare(app)
  for role, connection in pairs { consume = app._consuming, publish = app._publishing } do
    local name = app.name .. " (" .. role .. ")"
    offs[#offs + 1] = self:watch(connection, name)
    offs[#offs + 1] = self:ready("connection " .. name, function() return connection_is_ready(connection) end)
  end
  offs[#offs + 1] = self:ready("app " .. app.name, function()
    if app.state == "running" then return true end
    return nil, app.state
  end)
  return function()
    for _, off in ipairs(offs) do off() end
  end
end

--- The page for Prometheus.
---@return string
function Metrics:text() return self.registry:text() end

---@class moonrabbit.MetricsServerOptions
---@field metrics moonrabbit.Metrics?      whose page and checks; or:
---@field text (fun(): string|nil, string?)?  makes the page, such as the sum of several workers'
---@field ready (fun(): table[])?          the checks of `/readyz`: { name, check }; those of `metrics` by default
---@field health (fun(): table[])?         those of `/healthz`
---@field address string?                  "127.0.0.1:9419" by default
---@field runtime (string|table)?          "native" by default
---@field timeout number?                  seconds for a request, and for its answer; 5 by default
---@field max_clients integer?             at once; 32 by default
---@field log fun(level: string, text: string)?

--- Serves `/metrics`, `/healthz` and `/readyz`. nil, err when the address cannot be listened on.
---@param opts moonrabbit.MetricsServerOptions
---@return moonrabbit.metrics.Server|nil, moonrabbit.Error?
function metrics.serve(opts)
  local server, err = require("moonrabbit.metrics.server").serve(opts, 2)
  return server, err
end

return metrics
