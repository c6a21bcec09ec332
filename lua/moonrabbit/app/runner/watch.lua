--- Runs that take too long.
--
-- A run costs nothing here: its job says when it started and whether it is over. One task looks at the jobs when the first
-- of those that run is due. While none runs it looks once in the time that a run has, for what starts after a look is not due
-- before that; and a look that finds none ends the task, until the next run.
-- @module moonrabbit.app.runner.watch

---@class moonrabbit.app.Watch
---@field idle boolean  `start` is to be called with the next run
local Watch = {}
Watch.__index = Watch

--- `jobs`: a set of those that there are. `expired(job)` is called in the watch's task; it must not wait.
---@param runtime table
---@param seconds number
---@param jobs table<table, true>
---@param expired fun(job: table)
---@return moonrabbit.app.Watch
function Watch.new(runtime, seconds, jobs, expired)
  return setmetatable({ runtime = runtime, now = runtime.now, seconds = seconds, jobs = jobs, expired = expired,
    wake = runtime.condition(), over = false, idle = true }, Watch)
end

local function by_start(a, b) return a.started < b.started end

-- The runs that are due, and when the next one is; nil: none is running.
local function look(self, now)
  local late, next_due = {}, nil
  for job in pairs(self.jobs) do
    if not job.over and not job.expired then
      local due = job.started + self.seconds
      if due <= now then
        late[#late + 1] = job
      elseif not next_due or due < next_due then
        next_due = due
      end
    end
  end
  table.sort(late, by_start)
  return late, next_due
end

local function watch(self)
  local due = self.now() + self.seconds
  while due and not self.over do
    local left = due - self.now()
    if left > 0 then
      self.wake:wait(left)
    else
      local late
      late, due = look(self, self.now())
      for i = 1, #late do self.expired(late[i]) end
    end
  end
  self.idle = true
end

--- A run starts, and nobody watches.
function Watch:start()
  self.idle = false
  self.runtime.spawn(watch, self)
end

--- No run is watched any more.
function Watch:stop()
  self.over = true
  self.wake:broadcast()
end

return Watch
