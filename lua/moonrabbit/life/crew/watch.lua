--- How the parent of workers looks at them: the sum of their pages, whether they are ready, whether one is stuck.
-- @module moonrabbit.life.crew.watch

local notify = require "moonrabbit.life.notify"
local sum = require "moonrabbit.metrics.sum"

--- How long a page may take, and how often each worker is looked at.
local PATIENCE, INTERVAL = 2, 5
--- A worker that has said nothing for so long is not healthy.
local STUCK = 30

---@class moonrabbit.life.Crew
local methods = {}

local function look_at_all(self, patience)
  local left, done = 0, self.runtime.condition()
  for _, member in ipairs(self.members) do
    if member.pid then
      left = left + 1
      self.runtime.spawn(function()
        member:look(patience or PATIENCE)
        left = left - 1
        done:signal()
      end)
    end
  end
  while left > 0 do done:wait() end
end

--- The sum of the pages of metrics.
---@return string
function methods:page()
  look_at_all(self)
  self.own.families.workers_ready:with():set(self:count_at_work())
  local pages = { self.own:text(), self.gone }
  for _, member in ipairs(self.members) do pages[#pages + 1] = member.page end
  return sum.sum(pages, self.highest)
end

local function checks(self, problem_of)
  local list = {}
  for i, member in ipairs(self.members) do
    list[i] = { name = "worker " .. member.number, check = function()
      local problem = problem_of(member)
      if problem then return nil, problem end
      return true
    end }
  end
  return list
end

--- For `/readyz`: all of them are.
---@return table[]
function methods:ready()
  look_at_all(self)
  return checks(self, function(member) return not member:works() and (member.problem or "it starts") or nil end)
end

local function silent_for(self, member, seconds)
  return member.ready and member.pid and self.runtime.now() - member.answered > seconds
end

--- For `/healthz`: none of them is stuck.
---@return table[]
function methods:healthy()
  return checks(self, function(member) return silent_for(self, member, STUCK) and "it does not answer" or nil end)
end

--- Keeps their pages fresh, for ever. Under systemd's watchdog a worker whose loop is held up is replaced.
---@param watchdog number? seconds
function methods:watch(watchdog)
  while true do
    self.runtime.sleep(math.min(INTERVAL, watchdog or INTERVAL))
    notify.send "WATCHDOG=1"
    look_at_all(self, math.min(PATIENCE, watchdog or PATIENCE))
    notify.send "WATCHDOG=1" -- a worker that does not answer is not the parent's end
    for _, member in ipairs(self.members) do
      if watchdog and silent_for(self, member, 2 * watchdog + PATIENCE) then
        self.log("error", ("worker %d does not answer, and is killed"):format(member.number))
        member:signal "KILL"
      end
    end
  end
end

return methods
