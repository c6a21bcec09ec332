--- What the shop's processes have written to their files, read as it grows: counts of outcomes, and which orders
-- came, were mailed, came again.
local watch = {}

local apps = { "orders", "payments", "mail" }
watch.apps = apps

local Watch = { apps = apps }
Watch.__index = Watch

--- folder: where the files are.
function watch.new(folder)
  local self = setmetatable({ folder = folder, read = {}, rest = {}, events = {}, mails = {}, mail_count = 0 }, Watch)
  for _, name in ipairs(apps) do
    self[name] = { delivered = 0, again = 0, settled = {}, outcomes = 0, came = {} }
  end
  return self
end

-- The whole lines that a file has got since the last look.
local function new_lines(self, name)
  local file = io.open(self.folder .. "/" .. name, "rb")
  if not file then return {} end
  file:seek("set", self.read[name] or 0)
  local text = file:read "*a" or ""
  file:close()
  self.read[name] = (self.read[name] or 0) + #text
  text = (self.rest[name] or "") .. text
  local lines, last = {}, 0
  for line, ends in text:gmatch "([^\n]*)\n()" do
    lines[#lines + 1], last = line, ends - 1
  end
  self.rest[name] = text:sub(last + 1)
  return lines
end

local readers = {}

function readers.delivered(self, name, rest)
  local id, how = rest:match "^(%S+) (%a+)$"
  local app = self[name]
  app.delivered = app.delivered + 1
  app.came[id] = true
  if how == "again" then app.again = app.again + 1 end
end

function readers.settled(self, name, outcome)
  local app = self[name]
  app.settled[outcome] = (app.settled[outcome] or 0) + 1
  app.outcomes = app.outcomes + 1
end

function readers.failed(self, name, why) self[name].failure = why end

function readers.event(self, name, rest)
  local what, why = rest:match "^(%S+) ?(.*)$"
  self.events[#self.events + 1] = { app = name, name = what, why = why }
end

--- Reads on.
function Watch:look()
  for _, name in ipairs(apps) do
    for _, line in ipairs(new_lines(self, name .. ".journal")) do
      local kind, rest = line:match "^(%a+) (.*)$"
      if readers[kind] then readers[kind](self, name, rest) end
    end
  end
  for _, line in ipairs(new_lines(self, "mailbox")) do
    local id = line:match "^[^\t]+"
    self.mails[id] = (self.mails[id] or 0) + 1
    self.mail_count = self.mail_count + 1
  end
end

--- How many of an app's messages had an outcome: "ok", "retry", "dead_letter", "duplicate", …
function Watch:count(name, outcome) return self[name].settled[outcome] or 0 end

--- How many an app has in its hands: delivered, and without an outcome. Of one that was killed it also counts what
-- it took with it; `written_off` says how many those are.
function Watch:in_hand(name)
  local app = self[name]
  return app.delivered - app.outcomes - (app.written_off or 0)
end

--- An app was killed: what it had in hand comes again. How many that is.
function Watch:write_off(name)
  local n = self:in_hand(name)
  self[name].written_off = (self[name].written_off or 0) + n
  return n
end

--- The first event of a name, if there was one.
function Watch:event(name)
  for _, event in ipairs(self.events) do
    if event.name == name then return event end
  end
end

return watch
