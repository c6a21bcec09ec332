-- Every block of Lua in the README and the guides runs. One that has no `require "moonrabbit"` of its
-- own is a fragment: it is given a connection and a channel. Those of the guide that return an app are run by
-- `moonrabbit run` too, until they consume, and are then told to stop.
local broker = require "support.broker"
local process = require "support.process"

local url = broker.url

local fragment = [[
local moonrabbit = require "moonrabbit"
local conn = assert(moonrabbit.connect(os.getenv "AMQP_URL"))
local ch = assert(conn:channel { confirm = true, prefetch = 100 })
assert(ch:queue_declare("orders", { durable = true }))
]]

-- Every page there is: one that is added is run too.
local function all_pages()
  local list = {}
  local pipe = assert(io.popen "ls README.md docs/*.md examples/*.md examples/*/README.md 2> /dev/null")
  for path in pipe:lines() do list[#list + 1] = path end
  pipe:close()
  return list
end
local pages = all_pages()

local function blocks(text)
  local list, line, start, body = {}, 0, nil, nil
  for each in (text .. "\n"):gmatch "(.-)\n" do
    line = line + 1
    if body and each == "```" then
      list[#list + 1] = { line = start, code = table.concat(body, "\n") .. "\n" }
      body = nil
    elseif body then
      body[#body + 1] = each
    elseif each == "```lua" then
      start, body = line, {}
    end
  end
  return list
end

local function runs_as_app(code)
  local path = process.file(code)
  local running = process.start({ "bin/moonrabbit", "run", path }, { env = { AMQP_URL = url } })
  for _ = 1, 400 do
    if running:code() or running:err():find("' runs", 1, true) then break end
    process.sleep(0.05)
  end
  running:signal "TERM"
  local ended, text = running:wait(20), running:err()
  running:stop()
  os.remove(path)
  assert.truthy(text:find("' runs", 1, true), text)
  assert.equal(0, ended, text)
end

describe("the documentation #smoke", function()
  local total = 0

  -- The blocks share queues.
  local function clean()
    if broker.not_ours() then return end
    for _, queue in ipairs { "hello", "orders", "double" } do
      process.run({ "bin/moonrabbit", "delete", "queue", queue }, { env = { AMQP_URL = url } })
    end
  end
  setup(clean)
  teardown(clean)

  local it_runs = broker.it_unless(it, pending, broker.not_ours())

  for _, page in ipairs(pages) do
    for _, block in ipairs(blocks(process.slurp(page) or "")) do
      total = total + 1
      it_runs(("runs: %s, line %d"):format(page, block.line), function()
        local code = block.code
        if not code:find 'require%(?%s*"moonrabbit"' then code = fragment .. code end
        local path = process.file(code)
        local result = process.run({ path }, { env = { AMQP_URL = url }, timeout = 20 })
        os.remove(path)
        assert.equal("", result.err)
        assert.equal(0, result.code)
      end)
      if page == "docs/guide.md" and block.code:find("return mr.app", 1, true) then
        it_runs(("moonrabbit run: %s, line %d"):format(page, block.line), function() runs_as_app(block.code) end)
      end
    end
  end

  it("has blocks to run", function() assert.truthy(total >= 10, total) end)

  it("has no link to a file that is not there", function()
    for _, page in ipairs(pages) do
      local folder = page:match "^(.*/)" or ""
      for target in (process.slurp(page) or ""):gmatch "%]%(([^)%s]+)%)" do
        local path = target:gsub("#.*$", "")
        if path ~= "" and not path:find "^https?://" then
          local file = io.open(folder .. path)
          assert.truthy(file, page .. " links to " .. path)
          file:close()
        end
      end
    end
  end)
end)
