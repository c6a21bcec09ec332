--- The timeline: for each fault and queue how much was confirmed (above the line) and delivered (below it), in an
-- SVG. The red band is the fault, from when it began to when it was healed. Pure.
local plot = {}

local BIN, BEFORE = 0.2, 2            -- seconds
local LEFT, RIGHT, WIDTH = 330, 20, 1100
local STRIP, TITLE, HALF = 26, 22, 11 -- pixels

local CAPTION = "Confirmed (above each line) and delivered (below it), by time; red: the fault, until it was healed"

local colors = { classic = "#4e79a7", mirrored = "#59a14f", quorum = "#b07aa1" }

local function rates(entries, queue, kind, from, bins)
  local list = {}
  for i = 1, bins do list[i] = 0 end
  for _, entry in ipairs(entries) do
    if entry.queue == queue and entry.kind == kind then
      local bin = math.floor((entry.at - from) / BIN) + 1
      if bin >= 1 and bin <= bins then list[bin] = list[bin] + 1 end
    end
  end
  return list
end

-- An area from the line at `y`, upwards or downwards; what lies beyond the usual rate is cut off.
local function area(list, usual, scale, y, direction)
  local parts = { ("M%d %d"):format(LEFT, y) }
  for i, count in ipairs(list) do
    local height = math.min(1, count / usual) * HALF
    parts[#parts + 1] = ("L%.1f %.1f"):format(LEFT + (i - 0.5) * BIN * scale, y + direction * height)
  end
  parts[#parts + 1] = ("L%.1f %d"):format(LEFT + #list * BIN * scale, y)
  return table.concat(parts) .. "Z"
end

local function escaped(text) return (text:gsub("[&<>]", { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;" })) end

-- The strips of one run.
local function strips(out, run, top)
  local from, to = run.began - BEFORE, run.ended
  local bins = math.ceil((to - from) / BIN)
  local scale = (WIDTH - LEFT - RIGHT) / (bins * BIN)
  local function x(at) return LEFT + (at - from) * scale end
  local bottom = top + TITLE + #run.rows * STRIP
  out[#out + 1] = ('<text x="10" y="%d" font-weight="bold">%s</text>'):format(top + 15, escaped(run.fault.name))
  out[#out + 1] = ('<text x="%d" y="%d" text-anchor="end" fill="#777">%.0f s</text>'):format(WIDTH - RIGHT, top + 15,
    to - run.began)
  out[#out + 1] = ('<rect x="%.1f" y="%d" width="%.1f" height="%d" fill="#e15759" opacity="0.18"/>'):format(
    x(run.began), top + TITLE, math.max(2, x(run.healed or run.began) - x(run.began)), bottom - top - TITLE)
  for i, row in ipairs(run.rows) do
    local y = top + TITLE + (i - 1) * STRIP + HALF + 1
    local published, consumed = run.publisher.book.entries, run.consumer.book.entries
    local color = colors[row.queue]
    out[#out + 1] = ('<text x="20" y="%d" fill="#333">%s: %d confirmed, %d lost, %d twice</text>'):format(y + 4,
      row.queue, row.confirmed, row.lost, row.duplicated)
    out[#out + 1] = ('<path d="%s" fill="%s"/>'):format(
      area(rates(published, row.name, "confirmed", from, bins), 100 * BIN, scale, y, -1), color)
    out[#out + 1] = ('<path d="%s" fill="%s" opacity="0.55"/>'):format(
      area(rates(consumed, row.name, "delivered", from, bins), 100 * BIN, scale, y, 1), color)
  end
  return bottom + 10
end

--- The whole picture of several runs.
function plot.svg(runs)
  local out, top = {}, 34
  for _, run in ipairs(runs) do
    if run.began and run.ended and #run.rows > 0 then top = strips(out, run, top) end
  end
  return ([[
<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">
<rect width="100%%" height="100%%" fill="white"/>
<text x="10" y="20" font-size="14">%s</text>
%s
</svg>
]]):format(WIDTH, top, CAPTION, table.concat(out, "\n"))
end

return plot
