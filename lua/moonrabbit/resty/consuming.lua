--- What a worker is told to consume: a queue with a handler, or the script of an app.
-- @module moonrabbit.resty.consuming

local Consumer = require "moonrabbit.consumer"
local errors = require "moonrabbit.errors"
local options = require "moonrabbit.options"
local phases = require "moonrabbit.resty.phases"
local runtime = require "moonrabbit.runtime.resty"

local check = options.check

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
    began = metrics and function() metrics:touch() end,
  }))
  return true
end

--- Begins to consume; throws for wrong options.
---@param self moonrabbit.resty.Client
---@param what string who asks
---@param opts moonrabbit.resty.ConsumeOptions
---@param level integer of the caller
---@return true|nil, string? problem
return function(self, what, opts, level)
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
