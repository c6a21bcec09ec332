--- What an app in a process tells: its log, and its metrics where they are asked for. Both outlive reloads.
-- @module moonrabbit.life.telemetry

local guard = require("moonrabbit.app.observer").guard
local journal = require "moonrabbit.life.journal"

---@class moonrabbit.life.Telemetry
---@field log fun(level: string, text: string, fields: table?)
---@field metrics moonrabbit.Metrics?
---@field management moonrabbit.Management?
local Telemetry = {}
Telemetry.__index = Telemetry

local telemetry = {}

---@param opts table  log, metrics and management, as moonrabbit.life.HostOptions has them
---@return moonrabbit.life.Telemetry
function telemetry.new(opts)
  local metrics = opts.metrics
  if metrics then
    for _, result in ipairs { "ok", "failed" } do metrics.families.reloads_total:with(result) end
  end
  return setmetatable({ log = opts.log, metrics = metrics, management = opts.management, offs = {} }, Telemetry)
end

--- Before an app starts. Its handlers find the metrics as `app.metrics`.
---@param app moonrabbit.App
function Telemetry:observe(app)
  local metrics = self.metrics
  app.metrics = metrics
  app:_observed_by(function(theirs)
    local ours = guard(journal.observer(self.log, theirs), self.log)
    return metrics and metrics:observer(ours) or ours
  end)
end

--- A connection was opened; in the place of an earlier one of that role.
---@param role string
---@param connection moonrabbit.Connection
---@param name string
function Telemetry:watch(role, connection, name)
  if not self.metrics then return end
  if self.offs[role] then self.offs[role]() end
  self.offs[role] = self.metrics:watch(connection, name)
end

--- An app consumes; in the place of an earlier one.
---@param app moonrabbit.App
function Telemetry:started(app)
  if not self.metrics then return end
  self.metrics:prepare(app)
  if self.ladders then self.ladders() end
  self.ladders = self.metrics:watch_ladders(app, { management = self.management, log = self.log })
end

--- The script was loaded again, or could not be.
---@param ok boolean
function Telemetry:reloaded(ok)
  if self.metrics then self.metrics.families.reloads_total:with(ok and "ok" or "failed"):inc() end
end

return telemetry
