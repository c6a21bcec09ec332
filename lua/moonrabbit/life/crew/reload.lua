--- How the parent of workers has them load their script again: one after the other, up to the first that refuses it.
-- @module moonrabbit.life.crew.reload

local notify = require "moonrabbit.life.notify"

---@class moonrabbit.life.Crew
local methods = {}

local function reload_one_by_one(self)
  local done = 0
  for _, member in ipairs(self.members) do
    if self.phase == "stopping" then return end
    if member.ready then
      local ok, why = member:reload(self.drain + self.GRACE)
      if ok then
        done = done + 1
      elseif member.ready then
        self.log("error", ("worker %d has not reloaded (%d before it have): %s"):format(member.number, done, why))
        return
      end
    elseif member.pid then
      member.line:send "reload" -- it will when it has started
    end
  end
  self.log("info", ("%d workers have reloaded"):format(done))
end

--- Every worker loads its script again, one after the other.
function methods:reload()
  self.again = true
  if self.reloading or self.phase == "stopping" then return end
  self.reloading = true
  notify.reloading()
  self.runtime.spawn(function()
    while self.again do
      self.again = false
      reload_one_by_one(self)
    end
    self.reloading = false
    if self.phase == "running" then notify.send "READY=1" end
  end)
end

return methods
