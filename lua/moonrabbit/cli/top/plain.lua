--- `moonrabbit top` where no terminal is: a table or a line of JSON, once or every interval.

local connect = require "moonrabbit.cli.connect"
local exit = require "moonrabbit.cli.exit"
local output = require "moonrabbit.cli.output"

local plain = {}

-- All sources at once; ends early when it is to stop.
local function look_at_all(self)
  local left = #self.sources
  for _, source in ipairs(self.sources) do
    self.runtime.spawn(function()
      source:look()
      left = left - 1
      self.wake:broadcast()
    end)
  end
  while left > 0 and not self.code do self.wake:wait() end
end

local function pause(self, seconds)
  local now = self.runtime.now
  local due = now() + seconds
  while now() < due and not self.code do self.wake:wait(due - now()) end
end

-- The code of what was asked for by name and could not be had; also where there is nothing at all.
local function verdict(self)
  local named, any, first = #(self.args.metrics or {}) > 0, false, nil
  for _, source in ipairs(self.sources) do
    if source.problem then
      local wanted = source ~= self.management and named or source == self.management and self.args.management
      if wanted and not first then first = source end
    else
      any = true
    end
  end
  if not any then first = first or self.sources[#self.sources] end
  return first and connect.exit_code(first.err, true) or exit.ok
end

--- Looks twice, an interval apart, writes it once, and ends.
---@param self moonrabbit.cli.Top
---@return integer exit_code
function plain.once(self)
  look_at_all(self)
  if not self.code then pause(self, self.args.interval) end
  if not self.code then look_at_all(self) end
  if self.code then return self.code end
  for _, source in ipairs(self.sources) do
    if source.problem then output.complain(("%s: %s"):format(source.name, source.problem)) end
  end
  self:write()
  return verdict(self)
end

--- Writes it every interval.
---@param self moonrabbit.cli.Top
---@return integer exit_code
function plain.again_and_again(self)
  while not self.code do
    local due = self.runtime.now() + self.args.interval
    look_at_all(self)
    if self.code or not self:write() then break end
    pause(self, math.max(0.05, due - self.runtime.now()))
  end
  return self.code or exit.failed
end

return plain
