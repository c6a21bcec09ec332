--- The story: a shop of three processes, and what happens to it. Each stage waits until what it tells has happened; one
-- that does not happen in time ends the story, and the demo fails.
local mr = require "moonrabbit"
local now = require "moonrabbit.runtime.native".now

local children = require "director.children"
local queues = require "director.queues"
local screen = require "director.screen"
local warm_up = require "director.warm_up"
local website = require "director.website"

local paint, say, thousands, mark = screen.paint, screen.say, screen.thousands, screen.mark

local story = {}

local function tell(...) say("    " .. string.format(...)) end

-- ---- Waiting ----------------------------------------------------------------------------------------

local function fail(...) error({ problem = string.format(...) }, 0) end

local function last_lines(text, n)
  local lines = {}
  for each in text:gmatch "[^\n]+" do lines[#lines + 1] = each end
  return table.concat(lines, "\n  ", math.max(1, #lines - n + 1))
end

-- Why messages failed last, by app: for somebody who has to find out why something did not happen.
local function last_failures(s)
  local list = {}
  for _, name in ipairs(s.watch.apps) do
    if s.watch[name].failure then list[#list + 1] = ("\n  %s failed last: %s"):format(name, s.watch[name].failure) end
  end
  return table.concat(list)
end

-- An app that ends without being told to ends the story, with what it said.
local function check(s)
  if s.stopped then error({ stopped = true }, 0) end
  for name, child in pairs(s.apps) do
    if child:ended() then
      fail("%s.lua ended with code %d:\n  %s", name, child.code, last_lines(child:said(), 4))
    end
  end
end

local function await(s, what, fn)
  while not fn() do
    check(s)
    if now() >= s.deadline then fail("%s: not within %g s%s", what, s.limit, last_failures(s)) end
    mr.sleep(0.05)
  end
end

local function pause(s, seconds)
  local till = now() + seconds * s.pace
  await(s, "a pause", function() return now() >= till end)
end

-- ---- Processes --------------------------------------------------------------------------------------

local function start(s, name)
  local child, err = s.children.moonrabbit(name, { "run", "--drain", "10", s.folder .. "/" .. name .. ".lua" })
  if not child then fail("%s.lua cannot be started: %s", name, err) end
  s.apps[name] = child
  await(s, name .. ".lua running", function() return child:said():find("' runs", 1, true) end)
end

-- A command to its end: its exit code and what it wrote.
local function run(s, name, child, err)
  if not child then fail("%s cannot be started: %s", name, err) end
  await(s, name, function() return child:ended() end)
  return child.code, child:out(), child
end

local function dlq(s, ...)
  local words = { "dlq", ... }
  local child, err = s.children.moonrabbit("dlq", words)
  say("", "    " .. paint("bold", "$ moonrabbit " .. table.concat(words, " ")))
  local code, out = run(s, "moonrabbit dlq", child, err)
  return code, out, child
end

-- ---- The stages -------------------------------------------------------------------------------------

local stages = {}

local function stage(title, fn) stages[#stages + 1] = { title = title, play = fn } end

stage("The main job: publish with confirms, consume with acks", function(s)
  local result, err = warm_up(s.control, s.publishing, s.name .. ".warm-up", s.messages)
  if not result then fail("the warm-up: %s", tostring(err)) end
  s.warm_up = result
  tell("%s persistent messages of 1 KiB: %s/s published and confirmed, %s/s consumed and acked",
    thousands(result.published), thousands(result.confirmed / result.publishing),
    thousands(result.delivered / result.consuming))
end)

stage("A shop opens: orders.lua, payments.lua, mail.lua", function(s)
  for _, name in ipairs { "mail", "payments", "orders" } do
    start(s, name)
    tell("%s moonrabbit run %s.lua  %s", mark.good, name, paint("dim", "pid " .. s.apps[name].pid))
  end
  local err
  s.website, err = website.new(s.publishing, s.name)
  if not s.website then fail("the website: %s", tostring(err)) end
  s.website:run(s.rate, function() return s.watch.mail_count + s.watch:count("orders", "dead_letter") end)
  await(s, "the first letters", function() return s.watch.mail_count >= 20 end)
  pause(s, 1)
  tell("the website takes %d orders a second; each becomes a payment and a letter", s.rate)
end)

stage("The bank does not always answer", function(s)
  await(s, "retries", function() return s.watch:count("payments", "retry") >= 10 end)
  pause(s, 1)
  tell("one charge in eight fails: those payments wait in the broker, and stand in nobody's way")
end)

stage("A new template for a fifth of the letters", function(s)
  await(s, "the canary's end", function() return s.watch:event "canary_rollback" end)
  tell("%s rolled back by itself: %s", paint("yellow", mark.arrow), s.watch:event("canary_rollback").why)
  pause(s, 1)
end)

stage("Customers click twice", function(s)
  await(s, "two dozen orders", function() return s.website.orders >= 24 end)
  s.website:click_again(24)
  await(s, "the duplicates", function() return s.watch:count("orders", "duplicate") >= s.website.twice end)
  tell("%s orders came a second time, and were filtered by their message id", s.website.twice)
  pause(s, 1)
end)

stage("An old till sends what nobody can read", function(s)
  s.old = 12
  s.website:place_old(s.old)
  await(s, "the dead letters", function() return s.watch:count("orders", "dead_letter") >= s.old end)
  tell("%d orders cost \"12,50\": no retry can help, so they are parked in %s", s.old, queues.dead(s.name, "orders"))
  pause(s, 1)
end)

-- Whether an app has its hands full; then it stands still, so that they are full when it dies.
local function caught(s, name)
  local function is_full()
    s.watch:look()
    return s.watch:in_hand(name) >= 15
  end
  local function tell_it(signal) os.execute(("kill -%s %d"):format(signal, s.apps[name].pid)) end
  if not is_full() then return false end
  tell_it "STOP"
  if is_full() then return true end
  tell_it "CONT"
  return false
end

stage("kill -9", function(s)
  local rushed, due = 0, 0
  await(s, "payments in hand", function()
    if now() >= due then
      s.website:place(s.rush)
      rushed, due = rushed + s.rush, now() + 2 -- again, where all is paid before anybody has looked
    end
    return caught(s, "payments")
  end)
  local victim = s.apps.payments
  s.apps.payments = nil
  victim:signal "KILL"
  while not victim:ended() do mr.sleep(0.005) end
  s.watch:look()
  s.killed = s.watch:write_off "payments"
  tell("%s a rush of %d orders, and payments.lua dies with %d payments in its hands (kill -9 %d)",
    paint("bold red", mark.bad), rushed, s.killed, victim.pid)
  local before = s.watch.payments.again
  start(s, "payments")
  await(s, "what the dead process had", function() return s.watch.payments.again > before end)
  pause(s, 0.5)
  tell("%s started again: the broker delivers them once more, and the books take no payment twice",
    paint("green", mark.good))
end)

stage("The broker is restarted", function(s)
  if not s.broker then return tell("left out: this broker (AMQP_URL) is yours") end
  local began, resent = now(), s.website.publisher:stats().resent
  local child, err = s.children.program("broker", { s.root .. "/scripts/broker", "restart", "--name", s.broker })
  if run(s, "scripts/broker restart", child, err) ~= 0 then
    fail("the broker did not start again:\n  %s", last_lines(child:said(), 4))
  end
  s.restart = now() - began
  local mails = s.watch.mail_count
  tell("it is back after %.1f s", s.restart)
  await(s, "letters after the restart", function() return s.watch.mail_count > mails end)
  tell("%s so are all connections: nobody started anything again, and the website has sent %d orders once more",
    paint("green", mark.good), s.website.publisher:stats().resent - resent)
  pause(s, 1.5)
end)

-- Orders that the broker took and whose letters are not written, but for those that are parked.
local function left(s)
  local n = 0
  for id in pairs(s.website.placed) do
    if not s.watch.mails[id] then n = n + 1 end
  end
  return n
end

local function parked(s)
  local n = 0
  for _, app in ipairs(s.watch.apps) do n = n + s.watch:count(app, "dead_letter") end
  return n
end

stage("Closing time", function(s)
  s.website:close()
  await(s, "the last confirms", function() return s.website.done end)
  await(s, "the last letters", function()
    return left(s) <= parked(s) and left(s) <= (queues.dead_letters(s.control, s.name) or -1)
  end)
  tell("%s orders are done, %d are parked", thousands(s.website.orders - left(s)), left(s))
end)

local function show_some(text, most)
  local lines = {}
  for each in text:gmatch "[^\n]+" do lines[#lines + 1] = each end
  for i = 1, math.min(#lines, most) do
    local cut = lines[i]:sub(1, 92)
    say("    " .. paint("dim", cut .. (#cut < #lines[i] and "..." or "")))
  end
  if #lines > most then say("    " .. paint("dim", ("... and %d more"):format(#lines - most))) end
  return #lines
end

local function deploy(s)
  local file = assert(io.open(s.folder .. "/order.lua", "wb"))
  file:write(children.slurp(s.source .. "/order_mended.lua"))
  file:close()
  s.apps.orders:signal "HUP"
  await(s, "the reload of orders.lua", function()
    return s.apps.orders:said():find("reloaded", 1, true)
  end)
  local said = s.apps.orders:said()
  if said:find("not reloaded", 1, true) then fail("the mended order.lua: %s", last_lines(said, 1)) end
  say("", ("    %s order.lua is mended, and orders.lua takes it over by a SIGHUP"):format(paint("green", mark.good)))
end

local function replay(s, app)
  local code, out, child = dlq(s, "replay", queues.dead(s.name, app))
  show_some(out, 3)
  local done, failed = out:match "(%d+) replayed, (%d+) failed"
  if code ~= 0 or not done or failed ~= "0" then
    fail("the replay ended with code %d: %s", code, last_lines(child:said(), 2))
  end
  s.replayed[app] = tonumber(done)
end

stage("Dead letters: looked at, understood, replayed", function(s)
  local code, out = dlq(s, "list", queues.dead(s.name, "orders"))
  if show_some(out, 3) < s.old or code ~= 0 then fail("moonrabbit dlq list does not list what is parked") end
  deploy(s)
  for _, app in ipairs(s.watch.apps) do
    if s.watch:count(app, "dead_letter") > 0 then replay(s, app) end
  end
  await(s, "the letters of what was replayed", function() return left(s) == 0 end)
  tell("%s each of them has become a payment and a letter", paint("green", mark.good))
end)

stage("The shop closes", function(s)
  for _, name in ipairs { "orders", "payments", "mail" } do
    local child = s.apps[name]
    s.apps[name] = nil
    child:signal "TERM"
    await(s, name .. ".lua stopping", function() return child:ended() end)
    if child.code ~= 0 then
      fail("%s.lua stopped with code %d:\n  %s", name, child.code, last_lines(child:said(), 3))
    end
  end
  s.watch:look()
  tell("%s SIGTERM: each drains, and ends with 0", paint("green", mark.good))
end)

-- ---- All of it --------------------------------------------------------------------------------------

story.stages = #stages

--- Plays it. s: name, folder, source, root, broker, control and publishing (connections), children, watch, rate,
-- messages, rush, pace, limit. Throws { problem } or { stopped }.
function story.play(s)
  s.apps, s.replayed = {}, {}
  s.deadline = now() + s.limit
  for i, each in ipairs(stages) do
    s.stage, s.title = i, each.title
    check(s)
    say("", ("%s %s  %s"):format(paint("bold cyan", mark.arrow), paint("bold", each.title),
      paint("dim", ("%.1f s"):format(now() - s.began))))
    each.play(s)
  end
end

return story
