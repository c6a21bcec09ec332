-- The pages that tell what to type, typed. docs/guide.md is done by a reader with two terminals: each script is saved as
-- orders.lua, `moonrabbit run` goes to the first terminal, where Ctrl-C ends it before the next script, and every other
-- command to the second.
local broker = require "support.broker"
local pages = require "support.pages"
local process = require "support.process"

local quote = process.quote

-- A folder with `moonrabbit` on its own path.
local function desk()
  local folder = os.tmpname()
  os.remove(folder)
  os.execute("mkdir -p " .. folder .. "/bin")
  local pipe = assert(io.popen "pwd")
  local here = pipe:read "*l"
  pipe:close()
  local function absolute(path) return (";" .. path):gsub(";%./", ";" .. here .. "/"):sub(2) end
  local file = assert(io.open(folder .. "/bin/moonrabbit", "w"))
  file:write(("#!/bin/sh\nexec %s -e %s %s/bin/moonrabbit \"$@\"\n"):format(process.lua,
    quote(("package.path=%q package.cpath=%q"):format(absolute(package.path), absolute(package.cpath))), here))
  file:close()
  os.execute("chmod 755 " .. folder .. "/bin/moonrabbit")
  return folder
end

local reason = broker.not_ours()
local it_runs = broker.it_unless(it, pending, reason)

describe("the guide", function()
  local folder, running, port

  -- What is not ours runs without a sanitizer's library: curl hangs with it.
  local function shell(command, fn)
    local unset = { "MOONRABBIT_URL", not command:find("moonrabbit", 1, true) and "LD_PRELOAD" or nil }
    local words = { "sh", "-c", "cd " .. folder .. " && PATH=" .. folder .. '/bin:"$PATH" && ' .. command }
    return fn(words, { raw = true, env = { AMQP_URL = broker.url }, unset = unset })
  end

  local function clean()
    for _, queue in ipairs(broker.ok(broker.management():queues())) do
      if queue.name:find "^shop%f[%W]" or queue.name == "orders" then
        process.run({ "bin/moonrabbit", "delete", "queue", queue.name }, { env = { AMQP_URL = broker.url } })
      end
    end
  end

  setup(function()
    if reason then return end
    clean()
    folder, port = desk(), require("support.ports").free()
  end)

  teardown(function()
    if reason then return end
    if running then running:stop() end
    clean()
    os.execute("rm -rf " .. folder)
  end)

  -- Ctrl-C in the first terminal.
  local function ctrl_c()
    if not running then return end
    running:signal "INT"
    local code, said = running:wait(20), running:out() .. running:err()
    running:stop()
    running = nil
    assert.equal(0, code, said)
    assert.falsy(said:find("not reloaded", 1, true), said)
  end

  local function first_terminal(command)
    ctrl_c()
    running = shell("exec " .. command, process.start)
    broker.eventually(function() return running:code() or running:err():find("' runs", 1, true) end, 20, command)
    assert.is_nil(running:code(), running:err())
  end

  -- Whether there may be something a little later.
  local function early(command, result)
    if result.code == 124 then return false end -- it hung
    if command:find("dlq replay", 1, true) then return result.out:find "^0 replayed" ~= nil end
    return result.code ~= 0 and (command:find("dlq list", 1, true) or command:find("curl", 1, true))
  end

  -- A reader looks again when there is nothing yet.
  local function second_terminal(command)
    local result
    for _ = 1, 40 do
      result = shell(command, process.run)
      if not early(command, result) then break end
      process.sleep(0.25)
    end
    assert.equal(0, result.code, command .. "\n" .. result.out .. result.err)
    return result.out
  end

  -- A line as it is typed here: another port, for another one of us may have that one, and a look that ends.
  local function typed(line)
    line = line:gsub("9419", port)
    return ((line .. " "):gsub("^moonrabbit top%f[%s]",
      "moonrabbit top --once --interval 0.2 --no-management --metrics 127.0.0.1:" .. port))
  end

  -- What the first terminal then says, for the commands that hold these words, in their order.
  local answers = {
    { "one cup", "got one cup" },
    { '{"id":1}', 'order.eu.created\t{"id":1}' },
    { '{"id":12}', "accepted\t12" },
    { "kill -HUP", "reloaded" },
    { '{"id":1}', 'order\t{"id":1}' },
  }

  local function await_answer(command)
    local answer = answers[1]
    if not answer or not command:find(answer[1], 1, true) then return end
    broker.eventually(function() return (running:out() .. running:err()):find(answer[2], 1, true) end, 20, answer[2])
    table.remove(answers, 1)
  end

  local function follow(block, done)
    if block.language == "lua" and block.code:find("return mr.app", 1, true) then
      ctrl_c()
      local file = assert(io.open(folder .. "/orders.lua", "w"))
      file:write(block.code)
      file:close()
    elseif block.language == "sh" then
      for line in block.code:gmatch "[^\n]+" do
        local command = typed(line)
        if command:find "^moonrabbit run " and not command:find(" --check", 1, true) then
          first_terminal((command:gsub("%s+#.*$", "")))
        else
          done[#done + 1] = command .. "\n" .. second_terminal(command)
          await_answer(command)
        end
      end
    end
  end

  it_runs("can be followed from its first line to its last", function()
    local done = {}
    for _, block in ipairs(pages.read "docs/guide.md") do follow(block, done) end
    ctrl_c()
    assert.same({}, answers)
    done = table.concat(done, "\n")
    assert.truthy(done:find("an order without a number", 1, true), done)
    assert.truthy(done:find "%f[%d][1-9]%d* replayed, 0 failed", done)
    assert.truthy(done:find("moonrabbit_messages_delivered_total", 1, true), done)
  end)

  local has_sqlite = pcall(require, "luasql.sqlite3")
  local it_shops = broker.it_unless(it, pending,
    reason or not has_sqlite and "LuaSQL for SQLite is not installed" or nil)

  it_shops("has a shop, which runs by hand as its page says", function()
    local errors = folder .. "/shop.err"
    local waits = {
      ([[until [ "$(grep -c "' runs" %s)" = 3 ]; do sleep 0.1; done]]):format(errors),
      [[until [ -s "$SHOP_DATA/mailbox" ]; do sleep 0.1; done]],
    }
    local code = assert(pages.read "examples/shop/README.md"[1]).code
    local typed_code, slept = code:gsub("sleep [^\n]*", function() return table.remove(waits, 1) end)
    assert.equal(2, slept)
    local script = ("PATH=%s/bin:\"$PATH\"\n{ %s} 2> %s\nrm -rf \"$SHOP_DATA\""):format(folder, typed_code, errors)
    local result = process.run({ "bash", "-c", script },
      { raw = true, env = { AMQP_URL = broker.url }, unset = { "MOONRABBIT_URL" } })
    assert.equal(0, result.code, process.slurp(errors))
    assert.truthy(result.out:find("1\tada@shop.example\t", 1, true), result.out)
  end)
end)
