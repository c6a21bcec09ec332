--- What the story is told on: lines that stay, and on a terminal a panel under them that is drawn anew, with colours.
-- Where stdout is no terminal, or NO_COLOR is set, there are plain lines and nothing else.
local screen = {}

local function succeeds(command)
  local status = os.execute(command)
  return status == true or status == 0
end

local function is_set(name)
  local value = os.getenv(name)
  return value ~= nil and value ~= ""
end

local colours = {
  bold = "1", dim = "2", red = "31", green = "32", yellow = "33", blue = "34", magenta = "35", cyan = "36",
}

local utf8 = ((is_set "LC_ALL" and os.getenv "LC_ALL") or (is_set "LC_CTYPE" and os.getenv "LC_CTYPE")
  or os.getenv "LANG" or ""):lower():find "utf%-?8" ~= nil

screen.live = not is_set "NO_COLOR" and os.getenv "TERM" ~= "dumb" and succeeds "test -t 1"

local drawn = 0 -- lines of the panel that are on the screen

io.stdout:setvbuf(screen.live and "full" or "line")

--- A text in a colour, or in several: "bold red".
function screen.paint(names, text)
  if not screen.live then return text end
  local codes = {}
  for name in names:gmatch "%a+" do codes[#codes + 1] = colours[name] end
  return ("\27[%sm%s\27[0m"):format(table.concat(codes, ";"), text)
end

local function wipe()
  if drawn > 0 then io.stdout:write("\27[", drawn, "A\r\27[J") end
  drawn = 0
end

--- Lines that stay.
function screen.say(...)
  if screen.live then wipe() end
  io.stdout:write(table.concat({ ... }, "\n"), "\n")
  io.stdout:flush()
end

--- Draws the panel anew. Lines that are too long for the terminal are cut by it, not wrapped.
function screen.panel(lines)
  if not screen.live then return end
  wipe()
  io.stdout:write("\27[?25l\27[?7l", table.concat(lines, "\n"), "\n\27[?7h")
  io.stdout:flush()
  drawn = #lines
end

--- Takes the panel away, and gives the cursor back.
function screen.close()
  if screen.live then
    wipe()
    io.stdout:write "\27[?7h\27[?25h"
  end
  io.stdout:flush()
end

local levels = { " ", ".", ".", ":", "-", "=", "+", "*", "#" }
if utf8 then levels = { " ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█" } end

--- A row of numbers as a row of small bars, the largest of them full.
function screen.bars(numbers, largest)
  local parts = {}
  for i, n in ipairs(numbers) do
    parts[i] = levels[n <= 0 and 1 or 2 + math.floor(math.min(1, n / math.max(largest, 1e-9)) * (#levels - 2))]
  end
  return table.concat(parts)
end

--- A bar of so many columns, filled by a share from 0 to 1.
function screen.meter(share, columns)
  local full = math.floor(math.max(0, math.min(1, share)) * columns + 0.5)
  return (utf8 and "█" or "#"):rep(full) .. (utf8 and "░" or "."):rep(columns - full)
end

screen.mark = { good = "+", bad = "!", arrow = ">" }
if utf8 then screen.mark = { good = "✓", bad = "✗", arrow = "▸" } end

--- 12,345
function screen.thousands(n)
  local text = ("%.0f"):format(n):reverse():gsub("(%d%d%d)", "%1,"):reverse()
  return (text:gsub("^,", ""))
end

return screen
