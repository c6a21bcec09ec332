--- `moonrabbit top` on a terminal: keys, sizes, and what is drawn.

local exit = require "moonrabbit.cli.exit"
local figures = require "moonrabbit.cli.top.figures"
local protect = require "moonrabbit.protect"
local terminal = require "moonrabbit.cli.top.terminal"

local live = {}

local function next_key(sort)
  local order = figures.sort_order
  for i, key in ipairs(order) do
    if key == sort then return order[i % #order + 1] end
  end
end

local actions = {
  q = function(self) self.code = exit.ok end,
  s = function(self) self.sort = next_key(self.sort) end,
  r = function(self) self.reverse = not self.reverse end,
}

local function looks(self)
  local count = 0
  for _, source in ipairs(self.sources) do count = count + source.looks end
  return count
end

-- Seconds between two looks at the keys.
local KEYS = 0.1

local function watch(self, term)
  local now, colourless = self.runtime.now, (os.getenv "NO_COLOR" or "") ~= ""
  local seen, due = nil, 0
  for _, source in ipairs(self.sources) do source:keep_looking(self.args.interval) end
  while not self.code do
    local changed = false
    for key in term:keys():gmatch "." do
      if actions[key] then
        actions[key](self)
        changed = true
      end
    end
    if self.resized then self.width, self.height, self.resized = nil, nil, false end
    if not self.width then
      self.width, self.height = terminal.size()
      changed = true
    end
    if changed or seen ~= looks(self) or now() >= due then
      seen, due = looks(self), now() + math.max(1, self.args.interval)
      local ok = term:draw(self:lines(self.width, self.height, term:has_keys()), colourless)
      if not ok then return exit.failed end
    end
    if not self.code then self.wake:wait(KEYS) end
  end
  return self.code
end

--- Draws it until it is to stop.
---@param self moonrabbit.cli.Top
---@return integer exit_code
function live.run(self)
  self.runtime.signal("WINCH", function()
    self.resized = true
    self.wake:broadcast()
  end)
  local term = terminal.open()
  local ok, code = protect(watch, self, term)
  term:restore()
  self.runtime.signal("WINCH", nil)
  if not ok then error(code, 0) end
  return code
end

return live
