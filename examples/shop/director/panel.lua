--- What is shown under the story while it goes on: for each of the shop's parts how many messages it has handled,
-- retried, parked and filtered, and how fast, over the last seconds. Elsewhere than on a terminal a line now and then.
local screen = require "director.screen"

local panel = {}

local SECONDS, EVERY = 16, 0.5 -- of the bars; of each of them

local rows = { { "website", "cyan" }, { "orders", "blue" }, { "payments", "magenta" }, { "mail", "green" } }

local function bars_of(history)
  local list, last = {}, history[#history] or 0
  for i = SECONDS / EVERY, 1, -1 do
    local newer, older = history[#history - i + 1], history[#history - i]
    list[#list + 1] = newer and older and (newer - older) / EVERY or 0
  end
  local second_ago = history[#history - 2] or history[1] or 0
  return list, last - second_ago
end

--- story: has website, watch, stage, stages, title, began.
function panel.new(story)
  local self = { story = story, history = {}, next = 0, said = nil, next_line = 0 }
  for _, row in ipairs(rows) do self.history[row[1]] = {} end
  return setmetatable(self, { __index = panel })
end

local function done(self, name)
  local story = self.story
  if name == "website" then return story.website and story.website.published or 0 end
  return story.watch:count(name, "ok")
end

local function note_history(self, time)
  if time < self.next then return end
  self.next = time + EVERY
  for _, row in ipairs(rows) do
    local history = self.history[row[1]]
    history[#history + 1] = done(self, row[1])
    if #history > SECONDS / EVERY + 1 then table.remove(history, 1) end
  end
end

local function line(self, row)
  local name, watch = row[1], self.story.watch
  local bars, rate = bars_of(self.history[name])
  local cells = ("%9s"):format(screen.thousands(done(self, name)))
  if name == "website" then
    cells = cells .. (" "):rep(27)
  else
    for _, outcome in ipairs { "retry", "dead_letter", "duplicate" } do
      cells = cells .. ("%9s"):format(screen.thousands(watch:count(name, outcome)))
    end
  end
  return ("  %s%s %s %5.0f/s"):format(screen.paint(row[2], ("%-9s"):format(name)), cells,
    screen.paint(row[2], screen.bars(bars, self.largest)), math.max(0, rate))
end

local function foot(self, time)
  local story = self.story
  return ("  %s %s"):format(screen.paint("yellow", screen.meter(story.stage / story.stages, 20)),
    screen.paint("dim", ("%d of %d, %s, %.1f s"):format(story.stage, story.stages, story.title, time - story.began)))
end

local function draw(self, time)
  self.largest = 20
  for _, row in ipairs(rows) do
    for _, n in ipairs((bars_of(self.history[row[1]]))) do self.largest = math.max(self.largest, n) end
  end
  local lines = { "", screen.paint("dim", ("  %-9s%9s%9s%9s%9s"):format("", "done", "retried", "parked", "filtered")) }
  for _, row in ipairs(rows) do lines[#lines + 1] = line(self, row) end
  lines[#lines + 1] = foot(self, time)
  screen.panel(lines)
end

local function write_line(self, time)
  if time < self.next_line then return end
  self.next_line = time + 3
  local watch = self.story.watch
  local text = ("    placed %d, orders %d, payments %d (%d retried), mail %d"):format(done(self, "website"),
    done(self, "orders"), done(self, "payments"), watch:count("payments", "retry"), done(self, "mail"))
  if text ~= self.said and done(self, "website") > 0 then screen.say(text) end
  self.said = text
end

--- Shows how things are at a time.
function panel:show(time)
  note_history(self, time)
  if screen.live then draw(self, time) else write_line(self, time) end
end

return panel
